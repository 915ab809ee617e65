"""Bytes to numbers: divided by 255, less a mean, over a standard deviation, per channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from passes.errors import InputError


@dataclass(frozen=True)
class Normalization:
    """Called with images ``[N, C, H, W]``, uint8, it gives them as float32.

    Attributes:
        mean: per channel, of values in [0, 1].
        std: per channel, above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: there are not as many of both, or a deviation is not above 0.
        """
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise InputError(
                f"normalization is [means, deviations], one of each per channel and deviations above 0, not "
                f"[{list(self.mean)}, {list(self.std)}]"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch, on its device.

        Raises:
            InputError: it has another number of channels.
        """
        if images.shape[1] != len(self.mean):
            raise InputError(f"normalization is of {len(self.mean)} channels, and images have {images.shape[1]}")
        normalised: Tensor = v2.normalize(
            v2.to_dtype(images, torch.float32, scale=True), list(self.mean), list(self.std)
        )
        return normalised


NORMALIZATIONS = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def normalization(given: str | tuple[list[float], list[float]]) -> Normalization:
    """A normalisation by its name, or of means and deviations.

    Raises:
        InputError: there is none of that name, or the numbers can't be.
    """
    if not isinstance(given, str):
        return Normalization(*(tuple(each) for each in given))
    if given not in NORMALIZATIONS:
        raise InputError(
            f"unknown normalization {given!r}; choose {', '.join(NORMALIZATIONS)}, or give [means, deviations]"
        )
    return NORMALIZATIONS[given]
