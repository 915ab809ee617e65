"""Comparing tensors: how far they are from others, and how far rounding may take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kinds(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor; where these are not the same, nothing can be compared."""
    return [(tuple(x.shape), x.dtype) for x in tensors]


def distance(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors of one shape, and largest finite absolute value of `expected`.

    The same NaN or the same infinity in both is no difference, in one alone an infinite one.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    off = torch.where(same, 0, actual.to(wide) - expected.to(wide)).abs().nan_to_num(torch.inf, torch.inf)
    scale = expected.to(wide).abs().nan_to_num(0, 0, 0)
    worst, most = (float(each.max()) if each.numel() else 0.0 for each in (off, scale))
    return worst, most


def rounding(dtype: torch.dtype) -> float:
    """Differences up to this share of the largest value are rounding, which adds up over a deep network."""
    return min(1e4 * torch.finfo(dtype).eps, 0.1) if dtype.is_floating_point or dtype.is_complex else 0.0
