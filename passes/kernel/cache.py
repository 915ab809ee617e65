"""Where compiled code is kept: one directory per package version and hash of the kernel's own sources.

A cached numba function that calls an intrinsic would go on running old code after the intrinsic was edited; under this
key it can't. ``NUMBA_CACHE_DIR`` moves the cache; without it, it lies in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path


def source_key() -> str:
    """Package version, and a hash of every source file of the kernel."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{version('sgfx')}-{digest.hexdigest()[:16]}"


@cache
def directory() -> Path | None:
    """The cache's directory, made if needed; None if it can't be written (then nothing is cached)."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(os.environ.get("NUMBA_CACHE_DIR") or user / "sgfx") / f"sgfx-kernel-{source_key()}"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError:
        return None


def load(name: str) -> bytes | None:
    """Read a cached file, or None if it is missing or damaged."""
    place = directory()
    if place is None or not (place / name).exists():
        return None
    digest, data = (content := (place / name).read_bytes())[:32], content[32:]
    return data if hashlib.sha256(data).digest() == digest else None


def store(name: str, data: bytes) -> None:
    """Write a file in one step, so that no other process ever reads half of it."""
    place = directory()
    if place is None:
        return
    with tempfile.NamedTemporaryFile(dir=place, delete=False) as file:
        file.write(hashlib.sha256(data).digest() + data)
    Path(file.name).replace(place / name)
