"""Comparing tensors: how far they are from others, and how far rounding may take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """How far a tensor is from another one of its shape.

    Attributes:
        worst: the largest absolute difference. The same NaN or the same infinity in both is none, in one alone it is
            infinite.
        largest: the largest finite absolute value that was expected.
        rounding: differences up to this are rounding, which adds up over a deep network.
    """

    worst: float
    largest: float
    rounding: float

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding explains."""
        return self.worst <= self.rounding

    @property
    def relative(self) -> float:
        """The worst difference over the largest value; as it is, where that is 0."""
        return self.worst / self.largest if self.largest else self.worst


def kinds(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor; where these are not the same, nothing can be compared."""
    return [(tuple(x.shape), x.dtype) for x in tensors]


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """How far `actual` is from `expected`, which has its shape.

    >>> found = difference(torch.tensor([1.0, -2.5]), torch.tensor([1.0, -2.0]))
    >>> found.worst, found.largest, found.relative, found.is_rounding
    (0.5, 2.0, 0.25, False)
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    off = torch.where(same, 0, actual.to(wide) - expected.to(wide)).abs().nan_to_num(torch.inf, torch.inf)
    scale = expected.to(wide).abs().nan_to_num(0, 0, 0)
    worst, largest = (float(each.max()) if each.numel() else 0.0 for each in (off, scale))
    return Difference(worst, largest, _share_of_rounding(expected.dtype) * largest)


def _share_of_rounding(dtype: torch.dtype) -> float:
    """How large rounding may be, as a share of the largest value; whole numbers have none."""
    return min(1e4 * torch.finfo(dtype).eps, 0.1) if dtype.is_floating_point or dtype.is_complex else 0.0
