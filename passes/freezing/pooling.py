"""Poolings as the kernel's steps: the largest numbers in windows, and means, which are depthwise layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passes import kernel
from passes.kernel import Block, Geometry, PlaneForm, pack_blocks
from passes.kernel.codegen.window_kernel import STRIDES
from passes.kernel.plane_step import PlaneStep
from passes.layers.known.as_torch_made_it import is_as_torch_made_it

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def is_pool(module: nn.Module | None) -> bool:
    """Whether a module is a pooling that gives one tensor."""
    known = type(module) in POOLS and is_as_torch_made_it(module)  # type: ignore[arg-type]
    return known and not getattr(module, "return_indices", False)


def pool_step(pool: nn.Module, channels: int) -> nn.Module | None:
    """The step that computes a pooling of so many channels, or None where the kernel has none."""
    module: Any = pool
    (top, left), stride, size = _pair(module.padding), _pair(module.stride), _pair(module.kernel_size)
    dilation = _pair(getattr(module, "dilation", 1))
    geometry = Geometry(channels, channels, size, stride, (top, top, left, left), dilation)
    if module.ceil_mode or kernel.supported() is not None:
        return None
    if isinstance(module, nn.MaxPool2d):
        return PlaneStep(PlaneForm("largest", window=geometry)) if stride[1] in STRIDES else None
    counted = module.divisor_override or size[0] * size[1]
    if any(geometry.padding) and not module.count_include_pad and module.divisor_override is None:
        return None
    weight = torch.full((1, 1, *size), 1 / counted)
    return pack_blocks([Block(torch.tensor([c]), torch.tensor([c]), weight) for c in range(channels)], geometry)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
