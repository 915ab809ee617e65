"""The kernel's cache of compiled code: never an error, and nothing is run that others may have written."""

import os
import tempfile
from pathlib import Path

import pytest
from numba.core.caching import IndexDataCacheFile

from passes.kernel.codegen import cache
from passes.kernel.runtime import intrinsics as jit


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache in a place of its own."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    cache.directory.cache_clear()
    yield tmp_path / "cache" / f"sgfx-kernel-{cache.source_key()}"
    cache.directory.cache_clear()


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_it_is_keyed_by_version_and_source(place) -> None:
    assert cache.directory() == place
    assert place.stat().st_mode & 0o777 == 0o700
    cache.store("probe", b"content")
    assert cache.load("probe") == b"content"
    (place / "probe").write_bytes((place / "probe").read_bytes()[:-1])
    assert cache.load("probe") is None  # damaged: compiled again, never run


@pytest.mark.skipif(os.name != "posix", reason="modes and owners")
def test_what_others_may_write_to_or_own_is_not_used(place, monkeypatch) -> None:
    cache.store("probe", b"content")
    for mode in (0o620, 0o602):
        (place / "probe").chmod(mode)
        assert cache.load("probe") is None
    (place / "probe").chmod(0o644)
    assert cache.load("probe") == b"content"
    for path, mode, used in (
        (place, 0o770, False),
        (place, 0o707, False),
        (place, 0o755, True),
        (place.parent, 0o777, False),  # others could put a directory of their own in its place
        (place.parent, 0o1777, True),
    ):
        path.chmod(mode)
        cache.directory.cache_clear()
        assert (cache.directory() == place) == used, oct(mode)
        assert (cache.load("probe") == b"content") == used
        path.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
        assert cache.load("probe") is None
        cache.directory.cache_clear()
        assert cache.directory() is None


def test_a_full_disk_means_no_cache(place, monkeypatch) -> None:
    cache.directory()
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY), str(place / "temporary")
        monkeypatch.setattr(tempfile, "mkstemp", lambda **_: full)
    else:
        monkeypatch.setattr(os, "fdopen", failing(OSError(28, "No space left on device")))
    cache.store("probe", bytes(10_000))
    assert cache.load("probe") is None
    assert list(place.iterdir()) == []


def test_an_unreadable_object_file_means_no_cache(place) -> None:
    assert cache.directory() == place
    (place / "probe").mkdir()  # reading it is an OSError, whoever asks
    assert cache.load("probe") is None
    cache.store("probe", b"content")
    assert cache.load("probe") is None
    assert [each.name for each in place.iterdir()] == ["probe"]


def test_no_home_means_no_cache(monkeypatch, place) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", failing(RuntimeError("no home directory")))
    cache.directory.cache_clear()
    assert cache.directory() is None


def nothing(call):
    """A loop that does nothing."""


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("save", OSError(28, "No space left on device")),
        ("load", PermissionError(13, "Permission denied")),
        ("load", EOFError("Ran out of input")),
    ],
)
def test_loops_are_compiled_where_numba_fails_to_cache_them(place, monkeypatch, method, error) -> None:
    monkeypatch.setattr(IndexDataCacheFile, method, failing(error))
    assert jit.entry(nothing).address > 0


def test_what_is_wrong_with_the_code_is_still_said(place) -> None:
    def wrong(call):
        return call.nothing_of_the_kind

    with pytest.raises(Exception, match="nothing_of_the_kind"):
        jit.entry(wrong)
