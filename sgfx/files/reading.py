"""Files read whole, into memory of our own: what is done to a file later changes nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from passes.errors import InputError

_GIVE = "give the path of a file that sgfx.save wrote"


def content_of(file: Path) -> bytes:
    """Read a regular file, once, from one descriptor.

    Raises:
        InputError: it is a folder, FIFO, device or socket, or changes its size while it is read.
        FileNotFoundError: there is no such file.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; {_GIVE}")
    if (other := kind_of(file.stat().st_mode)) is not None:
        raise InputError(f"{file} is a {other}; {_GIVE}")
    # Without waiting: what has the name may have become a FIFO by now.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if (other := kind_of(status.st_mode)) is not None:
            raise InputError(f"{file} is a {other}; {_GIVE}")
        content = opened.read(status.st_size)
        if len(content) != status.st_size or opened.read(1):
            raise InputError(f"{file} was written to while it was read; load it again when it is whole")
    return content


def kind_of(mode: int) -> str | None:
    """What a path is that is no regular file, by the mode of its status; None for a file."""
    if stat.S_ISREG(mode):
        return None
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "device")
