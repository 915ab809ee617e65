"""How fast small images come: augmented a batch at a time on the device, and one by one as they are read.

``python -m benchmarks.loading`` makes 20,000 images of 32×32 and prints images per second of an epoch of batches that
a network could take, by both ways: `sgfx.data`'s bytes in memory with `Augmentation`, and torchvision's transforms on
single images in a DataLoader.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from sgfx.data.images import Pixels
from sgfx.data.loaders import Loaders
from sgfx.data.normalization import NORMALIZATIONS
from sgfx.data.sources import Source

BATCH = 64


class OneByOne(Dataset[tuple[Tensor, Tensor]]):
    """The usual way: each image is cropped, mirrored and normalised by itself."""

    def __init__(self, pixels: Pixels) -> None:
        """Keep the images, and make the transforms."""
        usual = NORMALIZATIONS["cifar10"]
        self._pixels = pixels
        self._transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(usual.mean), list(usual.std)),
            ]
        )

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its class."""
        return self._transform(self._pixels.images[index]), self._pixels.targets[index]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    count = parser.parse_args().images
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    pixels = Pixels(images, torch.arange(count) % 10)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaders = Loaders(
        Source("random", tuple("0123456789"), pixels, pixels, NORMALIZATIONS["cifar10"]), batch_size=BATCH
    )
    ways: dict[str, tuple[Iterable[tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], object]]] = {
        f"batch by batch on {device.type}": (loaders.train, loaders.augmentation)
    }
    for workers in (0, 2):
        usual = DataLoader(OneByOne(pixels), BATCH, shuffle=True, num_workers=workers)
        ways[f"one by one, {workers} workers"] = (usual, lambda *batch: batch)
    for name, (batches, augment) in ways.items():
        rates = sorted(count / seconds(batches, augment, device) for _ in range(3))
        print(f"{name:28} {rates[1]:10,.0f} images/s (three epochs: {rates[0]:,.0f} to {rates[2]:,.0f})")


def seconds(
    batches: Iterable[tuple[Tensor, Tensor]], augment: Callable[[Tensor, Tensor], object], device: torch.device
) -> float:
    """How long an epoch takes, with nothing done with the batches."""
    start = time.perf_counter()
    for inputs, targets in batches:
        augment(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
