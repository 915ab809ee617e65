"""Files that are whole or not there: written under another name, synced, then moved to their own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from passes.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file beside `path`; on leaving, it takes the name of `path`, whole and synced.

    After an error nothing is left of it, and an earlier file under `path` is as it was. A link is followed.

    Raises:
        InputError: `path` is a folder.
        FileNotFoundError: there is no such folder.
    """
    target = Path(os.path.realpath(Path(path)))
    if target.is_dir():
        raise InputError(f"{path} is a folder; give the path of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: there is no folder {target.parent}; make it first")
    temporary = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # as the umask has it, whatever the writer makes of it
        yield temporary
        temporary.chmod(mode)
        _sync(temporary, os.O_RDWR)
        temporary.replace(target)
        if os.name == "posix":  # elsewhere folders can't be opened
            _sync(target.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
