"""Batches of a data set: for training, for validation, and unlabelled ones to calibrate on.

Small images stay bytes until they are on the device, where the whole batch is augmented. Larger ones are cropped as
they are read, by torchvision: for training a random part of the image, for validation the middle of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from passes.errors import InputError
from sgfx.data.augmentation import Augmentation
from sgfx.data.images import Each, Images, Pixels
from sgfx.data.normalization import Normalization
from sgfx.data.sources import Source

CROP, RESIZED = 224, 256  # of larger images, by default and in this proportion
Batch = tuple[Tensor, Tensor]
Loader = DataLoader[Any]


class Batches(Dataset[Batch]):
    """Reads a batch of a split at once.

    Args:
        images: the split.
        each: brings images from files to their size.
        whole: turns the bytes of a batch into what the model takes.
    """

    def __init__(self, images: Images, each: Each, whole: Callable[[Tensor], Tensor]) -> None:
        """Keep them."""
        self._images, self._each, self._whole = images, each, whole

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._images)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What DataLoader asks for: a batch."""
        images, targets = self._images.read(indices, self._each)
        return self._whole(images), targets

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before an epoch: what was unreadable in the last one is told now."""
        self._images.report_unreadable()


class Loaders:
    """Makes the batches of a data set.

    Args:
        source: the data set.
        normalization: other than what is usual for it.
        size: pixels a side to which larger images are cropped; None: 224.
        batch_size: of a step, over all processes.
        workers: processes that read; small images need none.
        mixup, cutmix: see `Augmentation`.

    Attributes:
        augmentation: the `transform` of `sgfx.Trainer` that belongs to `train`.
        val: batches of validation images, normalised.
        classes: names of the classes.

    Raises:
        InputError: a batch can't be divided among the processes.
    """

    def __init__(
        self,
        source: Source,
        *,
        normalization: Normalization | None = None,
        size: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        """Make loaders; see the class."""
        self._source, self._workers, self.classes = source, workers, source.classes
        self._normalization = normalization or source.normalization
        self._size = size or CROP
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if batch_size < 1 or batch_size % processes:
            raise InputError(f"batch_size={batch_size} can't be divided among {processes} processes")
        self._share = batch_size // processes
        small = isinstance(source.train or source.val, Pixels)
        self.augmentation = Augmentation(
            self._normalization,
            crop=small,
            flip=source.mirrored and small,
            mixup=mixup,
            cutmix=cutmix,
            classes=len(source.classes),
        )
        self.val = self._loader(Batches(source.val, self._middle(), self._normalization), source.val, shuffle=False)

    @property
    def train(self) -> Loader:
        """Batches of training images, as bytes.

        Raises:
            InputError: there are none.
        """
        images = self._training()
        part = v2.Compose([v2.RandomResizedCrop(self._size, antialias=True), v2.RandomHorizontalFlip()])
        return self._loader(Batches(images, part, _as_they_are), images, shuffle=True)

    def unlabelled(self, count: int) -> list[Tensor]:
        """Training images without labels and augmentation, normalised: always the same, in batches ``[N, C, H, W]``.

        Raises:
            InputError: there are not as many.
        """
        images = self._training()
        if not 1 <= count <= len(images):
            raise InputError(f"{self._source.name} has {len(images)} training images: {count} can't be taken")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
        batches = Batches(images, self._middle(), self._normalization)
        loader = DataLoader(
            batches,
            batch_sampler=[chosen[i : i + 64] for i in range(0, count, 64)],
            num_workers=self._needed(images),
            collate_fn=_as_they_are,
        )
        read = [inputs for inputs, _ in loader]
        images.report_unreadable()
        return read

    @property
    def example(self) -> Tensor:
        """Two validation images ``[2, C, H, W]``, normalised."""
        val = Batches(self._source.val, self._middle(), self._normalization)
        return val.__getitems__(range(min(2, len(val))))[0]

    def report_unreadable(self) -> None:
        """Warn of images that could not be read in the last epoch."""
        for images in (self._source.train, self._source.val):
            if images is not None:
                images.report_unreadable()

    def _training(self) -> Images:
        if self._source.train is None:
            raise InputError(f"{self._source.name} has no training images: expected a folder train in it")
        return self._source.train

    def _middle(self) -> Each:
        middle: Each = v2.Compose([v2.Resize(self._size * RESIZED // CROP, antialias=True), v2.CenterCrop(self._size)])
        return middle

    def _needed(self, images: Images) -> int:
        return 0 if isinstance(images, Pixels) else self._workers

    def _loader(self, batches: Batches, images: Images, *, shuffle: bool) -> Loader:
        return DataLoader(
            batches,
            batch_size=self._share,
            shuffle=shuffle,
            num_workers=self._needed(images),
            collate_fn=_as_they_are,
            pin_memory=torch.accelerator.is_available(),
        )


def _as_they_are(batch: Any) -> Any:
    return batch
