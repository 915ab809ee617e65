"""Labels: a tensor of slot numbers in the shape of a value, that says which channel each of its elements belongs to.

A slot is one output channel of one layer. Slot 0 stands for everything that must stay where it is. A label tensor has
stride 0 along the dimensions that it doesn't vary along, so it takes hardly any memory, and moving data moves its
labels by the same operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fixed(shape: Sequence[int]) -> Tensor:
    """Labels of a value of this shape all of which must stay."""
    return torch.zeros((), dtype=torch.int64).expand(*shape) if len(shape) else torch.zeros((), dtype=torch.int64)


def along(slots: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Labels of a value of this shape whose channels, the `slots`, lie along `dim`."""
    return slots.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(*shape)


def compact(labels: Tensor) -> Tensor:
    """The same labels, with size 1 along every dimension that they don't vary along."""
    small = labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]
    for dim in range(small.dim()):
        first = small.narrow(dim, 0, min(1, small.shape[dim]))
        if small.shape[dim] > 1 and bool((small == first).all()):
            small = first
    return small


def varying(labels: Tensor) -> set[int]:
    """The dimensions along which labels vary."""
    return {dim for dim, size in enumerate(compact(labels).shape) if size > 1}


def carried(labels: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The labels in another shape of the same rank, or None if they vary along a dimension whose size changes."""
    small = compact(labels)
    if small.dim() != len(shape) or any(size not in (1, new) for size, new in zip(small.shape, shape, strict=True)):
        return None
    return small.expand(*shape)
