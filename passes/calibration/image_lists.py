"""Examples of a detector: lists of images of any sizes, with or without their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from passes.errors import InputError

BATCH = 8  # images that a detector is given at a time: they are large


def image_lists(batch: Any, where: str) -> Iterator[tuple[list[Tensor]]]:
    """What a detector is called with, for one batch: lists of at most `BATCH` images ``[C, H, W]``.

    Args:
        batch: a list of images, or a tensor of them ``[N, C, H, W]``, or either followed by targets, which are not
            looked at; or a single image, or an image and its target.
        where: what the batch is called in messages.

    Raises:
        InputError: it is none of these, or holds NaN or infinite values, or bytes.
    """
    images = _images(batch)
    if images is None:
        raise InputError(
            f"a detector takes lists of images [C, H, W], with or without targets, and {where} is a "
            f"{type(batch).__name__} of something else"
        )
    for image in images:
        if not image.is_floating_point():
            raise InputError(f"{where} has an image of {image.dtype}: give numbers in [0, 1], as in training")
        if not bool(torch.isfinite(image).all()):
            raise InputError(f"{where} holds NaN or infinite values: leave these images out")
    for start in range(0, len(images), BATCH):
        yield ([image.detach() for image in images[start : start + BATCH]],)


def _images(batch: Any) -> list[Tensor] | None:
    """The images of a batch, or None if it is of another form."""
    if isinstance(batch, Tensor):
        return list(batch) if batch.dim() == 4 else [batch] if batch.dim() == 3 else None
    if not isinstance(batch, tuple | list):
        return None
    if all(isinstance(each, Tensor) and each.dim() == 3 for each in batch):
        return list(batch)
    first, *rest = batch
    if len(rest) != 1 or not isinstance(rest[0], tuple | list | Mapping):
        return None
    return _images(first)
