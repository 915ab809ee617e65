"""Where compiled code is kept: one directory per package version and hash of the kernel's own sources.

A cached numba function that calls an intrinsic would go on running old code after the intrinsic was edited; under this
key it can't. ``NUMBA_CACHE_DIR`` moves the cache; without it, it lies in the user's cache directory. Where anything
goes wrong, nothing is cached, and all is compiled anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path


def source_key() -> str:
    """Package version, and a hash of every source file of the kernel."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{version('sgfx')}-{digest.hexdigest()[:16]}"


@cache
def directory() -> Path | None:
    """The cache's directory, made if needed; None where nothing can be cached.

    That is where it can't be written, and where others may write to it or own it: what is in it is run.
    """
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = Path(os.environ.get("NUMBA_CACHE_DIR") or user / "sgfx") / f"sgfx-kernel-{source_key()}"
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        above = place.parent.stat().st_mode
        if not _is_ours(place.stat()) or (os.name == "posix" and above & stat.S_IWOTH and not above & stat.S_ISVTX):
            return None
        place.chmod(0o700)  # numba makes folders in it as the umask has it
        with tempfile.TemporaryFile(dir=place):
            return place
    except (OSError, RuntimeError):  # the latter: there is no home
        return None


def load(name: str) -> bytes | None:
    """Read a cached file, or None if it is missing, unreadable, damaged, or if others may write to it or own it."""
    place = directory()
    if place is None:
        return None
    try:
        with (place / name).open("rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    return data if hashlib.sha256(data).digest() == digest else None


def store(name: str, data: bytes) -> None:
    """Write a file in one step, so that no other process ever reads half of it; or nothing, as on a full disk."""
    place = directory()
    if place is None:
        return
    with suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(temporary).replace(place / name)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _is_ours(status: os.stat_result) -> bool:
    """Whether this user alone owns a file or directory and may write to it."""
    if os.name != "posix":
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
