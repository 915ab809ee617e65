"""Images that can't be read: skipped, noted in whatever process met them, and named in one warning."""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from passes.errors import let_memory_errors_pass


def read_image(path: str) -> Image.Image | None:
    """The image in a file as RGB, or None if it can't be read."""
    try:
        with Image.open(path) as image:
            return _as_rgb(image)
    except Exception as error:  # damaged bytes make the decoders raise nearly anything
        let_memory_errors_pass(error)
        return None


def _as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind as RGB; Pillow would clip 16 bits to the 8 that are kept."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((pixels / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def warn_of(names: Collection[str], total: int, place: str) -> None:
    """Say how many images were skipped, and which."""
    first = sorted(names)[:3]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    warnings.warn(
        f"{len(names)} of {total} images of {place} can't be read and were skipped: {', '.join(first)}{more}",
        stacklevel=2,
    )


class Notes:
    """Names that worker processes write down and the main process reads: lines of a file, appended in one write."""

    def __init__(self) -> None:
        """Make the file; it goes with this object in the process that made it."""
        descriptor, path = tempfile.mkstemp(prefix="sgfx-unreadable-")
        os.close(descriptor)
        self._path = Path(path)
        self._told: set[str] = set()
        weakref.finalize(self, _remove, self._path, os.getpid())

    def add(self, name: str) -> None:
        """Note a name, from any process."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")

    def new(self) -> set[str]:
        """All names, if some were noted that were not told before; else none."""
        names = set(self._path.read_text(encoding="utf-8").splitlines())
        if names <= self._told:
            return set()
        self._told = names
        return names


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a forked worker
        path.unlink(missing_ok=True)
