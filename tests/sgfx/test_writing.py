"""How files come into being: whole, with the mode of what was there, never in place of what is no file."""

import errno
import os
import socket
import subprocess
import sys

import pytest

import sgfx
from sgfx.files.writing import replacing
from tests.sgfx.test_exporting import IMAGES, compiled
from tests.sgfx.test_files import Net, assert_same, small_net

posix = pytest.mark.skipif(os.name != "posix", reason="modes, FIFOs and devices")


def write(path, error=None):
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        if error is not None:
            raise error


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755])
def test_an_earlier_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    path.chmod(mode)
    write(path)
    assert (path.read_bytes(), path.stat().st_mode & 0o7777) == (b"new", mode)


@posix
def test_a_private_file_is_private_while_it_is_written(tmp_path):
    with replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may give files away")
def test_an_earlier_file_keeps_its_owner(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    write(path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 5678, 0o640)


@posix
def test_where_files_cant_be_given_away_they_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "file").write_bytes(b"earlier")
    monkeypatch.setattr(os, "chown", refuse)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.pt2").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "fifo", "FIFO"),
            (tmp_path / "socket", "socket"),
            ("/dev/null", "device"),
        ):
            with pytest.raises(sgfx.InputError, match=f"is a {kind}; give the path of a file"):
                sgfx.save(small_net(), path)
        with pytest.raises(sgfx.InputError, match="is a device; give the path of a file"):
            sgfx.export(compiled(), tmp_path / "link.pt2", IMAGES)
        assert (tmp_path / "fifo").is_fifo()
        assert (tmp_path / "socket").is_socket()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"/file can't be written: No space left on device") as caught:
        write(path, full)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is full
    with pytest.raises(PermissionError, match=r"/file can't be written: Permission denied"):
        write(path, PermissionError(errno.EACCES, "Permission denied", str(path)))
    with pytest.raises(FileNotFoundError, match="No such file or directory: 'other'"):  # not about this file
        write(path, FileNotFoundError(errno.ENOENT, "No such file or directory", "other"))
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, sys, torch, sgfx
small = sgfx.compile(torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3) for _ in range(2)]), groups=2, ratio=0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as a full disk, but for its number
for write in (sgfx.save, lambda *given: sgfx.export(*given, torch.zeros(1, 8, 9, 9))):
    try:
        write(small, sys.argv.pop(1))
    except OSError as error:
        print(error.errno, error, file=sys.stderr)
"""


@posix
def test_no_way_of_writing_ends_the_process_or_leaves_half_a_file(tmp_path):
    paths = [tmp_path / "small.safetensors", tmp_path / "small.pt2"]
    for path in paths:
        path.write_bytes(b"earlier")
    done = subprocess.run([sys.executable, "-c", FULL, *paths], check=False, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    for path in paths:
        assert f"{errno.EFBIG} [Errno {errno.EFBIG}] {path} can't be written: File too large" in done.stderr
        assert path.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_all_modes_can_be_loaded_again(file):
    file.chmod(0o400)
    sgfx.save(small_net(bound=0.5), file)
    assert_same(sgfx.load(file, into=Net()), small_net(bound=0.5))
