"""The paper's augmentations: crops and flips of small images, a whole batch at a time on its device, and mixing.

torchvision's transforms draw once for a batch, so that all its images would be cropped at the same place; the two
functions here draw for every image. Larger images are cropped one by one as they are read (`loaders`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from passes.options import checked_number
from sgfx.data.normalization import Normalization

PADDING = 4


def random_crop(images: Tensor, padding: int = PADDING) -> Tensor:
    """Shift each image by up to `padding` pixels each way; what comes in is 0.

    Args:
        images: ``[N, C, H, W]``.
        padding: pixels.

    Returns:
        The same shape and type.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(n, device=images.device)
    top, left = torch.randint(2 * padding + 1, (2, n), device=images.device)
    # A view of all crops ``[N, C, top, left, H, W]``, of which one for each image is copied.
    crops: Tensor = padded.unfold(2, height, 1).unfold(3, width, 1)
    return crops[image, :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Mirror every other image ``[N, C, H, W]``, by chance, left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


class Augmentation:
    """What becomes of a training batch on its device: the `transform` of `sgfx.Trainer`.

    Args:
        normalization: of the data set.
        crop: whether to crop at random, after padding by four pixels.
        flip: whether to mirror at random.
        mixup: the parameter of the beta distribution of torchvision's ``MixUp``; 0 is without.
        cutmix: the same for ``CutMix``; where both are given, a batch has the one or the other.
        classes: how many there are.

    Raises:
        InputError: a parameter is below 0.
    """

    def __init__(
        self,
        normalization: Normalization,
        *,
        crop: bool,
        flip: bool,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        classes: int = 0,
    ) -> None:
        """Make the transforms; see the class."""
        given = {"mixup": (v2.MixUp, mixup), "cutmix": (v2.CutMix, cutmix)}
        kinds = [(kind, checked_number(alpha, name, least=0)) for name, (kind, alpha) in given.items()]
        mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        self._mix = v2.RandomChoice(mixes) if mixes else None
        self._normalization, self._crop, self._flip = normalization, crop, flip

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """From images ``[N, C, H, W]``, uint8, and classes ``[N]`` to numbers, and probabilities if they are mixed."""
        if self._crop:
            images = random_crop(images)
        if self._flip:
            images = random_flip(images)
        images = self._normalization(images)
        return self._mix(images, targets) if self._mix is not None else (images, targets)
