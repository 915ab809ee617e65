"""A split of a data set: in memory as bytes where images are small, else as files that are read when needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from passes.errors import InputError
from sgfx.data.unreadable import Notes, read_image, warn_of

SMALL = 64  # pixels a side: such images are kept in memory
Each = Callable[[Image.Image], Image.Image]
Labelled = tuple[str, int]  # a file and its class


class Images(Protocol):
    """What a split can do: ``len()``, and read some of it."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, indices: Sequence[int], each: Each) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]``, uint8, and classes ``[N]``.

        Args:
            indices: which.
            each: brings an image that is read from its file to its size.
        """

    def report_unreadable(self) -> None:
        """Warn of images that could not be read, if there are new ones."""


class Pixels:
    """Images in memory.

    Args:
        images: ``[N, C, H, W]``, uint8.
        targets: classes ``[N]``, int64.
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        """Keep them."""
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        """See `Images`."""
        return len(self.targets)

    def read(self, indices: Sequence[int], each: Each) -> tuple[Tensor, Tensor]:
        """See `Images`; they have their size already."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.targets[chosen]

    def report_unreadable(self) -> None:
        """There are none: they were left out when they were read."""


class Files:
    """Images in files.

    One that can't be read is left out of its batch, whose other images are as they would be. In several processes,
    whose batches must be of one size, and where nothing else is left, the next that can be read takes its place.
    """

    def __init__(self, files: Sequence[Labelled], place: str) -> None:
        """Note the files; `place` is the folder, for messages."""
        self.files, self._place = list(files), place
        self._notes = Notes()
        self._several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def __len__(self) -> int:
        """See `Images`."""
        return len(self.files)

    def read(self, indices: Sequence[int], each: Each) -> tuple[Tensor, Tensor]:
        """See `Images`."""
        found = [self._one(index) for index in indices]
        if self._several or not any(found):
            found = [pair or self._next(index) for pair, index in zip(found, indices, strict=True)]
        read = [pair for pair in found if pair is not None]
        return torch.stack([as_bytes(each(image)) for image, _ in read]), torch.tensor([label for _, label in read])

    def report_unreadable(self) -> None:
        """See `Images`."""
        if names := self._notes.new():
            warn_of(names, len(self), self._place)

    def _one(self, index: int) -> tuple[Image.Image, int] | None:
        path, label = self.files[index]
        image = read_image(path)
        if image is None:
            self._notes.add(path)
            return None
        return image, label

    def _next(self, index: int) -> tuple[Image.Image, int]:
        for step in range(1, len(self)):
            if (pair := self._one((index + step) % len(self))) is not None:
                return pair
        raise InputError(f"none of the {len(self)} images of {self._place} can be read")


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB image as ``[3, H, W]``, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def images_of(files: Sequence[Labelled], place: str, size: int | None) -> Images:
    """A split of image files, in memory if the first image is small.

    Args:
        files: their paths and classes, at least one.
        place: the folder.
        size: pixels a side to which small images are scaled; None: as the first one is.

    Raises:
        InputError: no image can be read.
    """
    first = next(filter(None, (read_image(path) for path, _ in files)), None)
    if first is None:
        raise InputError(f"none of the {len(files)} images of {place} can be read (expected JPEG, PNG, …)")
    if max(first.size) > SMALL:
        return Files(files, place)
    sides = first.size if size is None else (size, size)

    def decoded(path: str) -> Tensor | None:
        image = read_image(path)
        if image is not None and image.size != sides:
            image = image.resize(sides, Image.Resampling.BILINEAR)
        return None if image is None else as_bytes(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(decoded, (path for path, _ in files)))
    if failed := [path for (path, _), image in zip(files, read, strict=True) if image is None]:
        warn_of(failed, len(files), place)
    labels = [label for (_, label), image in zip(files, read, strict=True) if image is not None]
    return Pixels(torch.stack([image for image in read if image is not None]), torch.tensor(labels))
