"""Detectors as torchvision has them, whatever their heads: known by what they are made of."""

from __future__ import annotations

from torch import nn


def is_detector(model: nn.Module) -> bool:
    """Whether a model takes a list of images of any sizes and resizes them itself, by its ``transform``.

    torchvision's R-CNNs, RetinaNet, FCOS and SSD do: they have a ``backbone``, and a ``transform`` that also brings the
    boxes back to the images as they were given.
    """
    transform, backbone = getattr(model, "transform", None), getattr(model, "backbone", None)
    return isinstance(backbone, nn.Module) and callable(getattr(transform, "postprocess", None))
