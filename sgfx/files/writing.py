"""Files that are whole or not there: written under another name, synced, then moved to their own."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from passes.errors import InputError
from sgfx.files.reading import kind_of

_PERMISSIONS = 0o7777


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file beside `path`; on leaving, it takes the name of `path`, whole and synced.

    It gets the mode of an earlier file under `path`, and its owner where the system lets us. After an error nothing is
    left of it, and the earlier file is as it was. A link is followed.

    Raises:
        InputError: `path` is a folder, FIFO, device or socket.
        FileNotFoundError: there is no such folder.
        OSError: the disk is full or the like; names `path`.
    """
    target = Path(os.path.realpath(Path(path)))
    if target.exists() and (other := kind_of(target.stat().st_mode)) is not None:
        raise InputError(f"{path} is a {other}; give the path of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {target.parent}; make it first")
    temporary = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & _PERMISSIONS  # as the umask has it, whatever the writer makes of it
        temporary.chmod(0o600)  # nobody else reads what they may not read in the end
        yield temporary
        _adopt(temporary, target, mode)
        _sync(temporary, os.O_RDWR)
        temporary.replace(target)
        if os.name == "posix":  # elsewhere folders can't be opened
            _sync(target.parent, os.O_RDONLY)
    except Exception as error:
        if (number := _number(error, {temporary, target})) is None:
            raise
        raise OSError(number, f"{path} can't be written: {os.strerror(number)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _adopt(temporary: Path, target: Path, mode: int) -> None:
    """Give a new file the owner and mode of the one whose place it takes, or `mode` where there is none."""
    if target.exists():
        before = target.stat()
        mode = before.st_mode & _PERMISSIONS
        for owner in ((before.st_uid, -1), (-1, before.st_gid)):
            with suppress(OSError, AttributeError):  # only root may give files away; elsewhere there are no owners
                os.chown(temporary, *owner)
    temporary.chmod(mode)


def _number(error: Exception, files: set[Path]) -> int | None:
    """What the system says went wrong in writing these files; None if the error is of another kind."""
    if isinstance(error, OSError) and (error.filename is None or Path(error.filename) in files):
        return error.errno
    if type(error).__module__.startswith("safetensors"):  # its writer is not in Python
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    return None


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
