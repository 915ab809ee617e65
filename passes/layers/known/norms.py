"""Norms that treat every channel by itself: which they are, and what they compute in eval mode.

With running statistics a batch norm is ``y = scale · x + shift`` per channel, with
``scale = weight / √(running_var + eps)`` and ``shift = bias − running_mean · scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.layers.known.optional_classes import class_of

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is torchvision's FrozenBatchNorm2d."""
    return type(module) is class_of("torchvision.ops.misc", "FrozenBatchNorm2d")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that treats every channel by itself, so that channels can be cut."""
    return (type(module) in _KINDS or is_frozen_norm(module)) and is_as_torch_made_it(module)


def is_affine(module: nn.Module | None) -> bool:
    """Whether a module of an eval graph is a norm that computes with running statistics."""
    if module is None or not is_norm(module) or not isinstance(module.running_mean, Tensor):
        return False
    return is_frozen_norm(module) or not module.training  # some refuse to leave train mode


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a norm with running statistics multiplies each channel by in eval mode, and adds to it; float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.detach()
    return scale, shift
