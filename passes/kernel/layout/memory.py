"""New memory for results and copies.

What is larger than 32 MiB, the C library takes from the system anew each time, and the system clears it page by page:
for a layer of few multiplications that takes longer than the layer. In huge pages it takes a quarter of that.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_FRESH = 32 * 2**20


def empty(shape: Sequence[int]) -> Tensor:
    """Return an uninitialised fp32 tensor, in huge pages if it is large and the system has them."""
    tensor = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
    size = 4 * tensor.numel()
    if size > _FRESH and (advise := _madvise()) is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: if it is not taken, nothing is lost
    return tensor


@cache
def _madvise() -> Any | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


class Arena:
    """Plans one block of memory for tensors that don't all live at the same time: each takes the first gap it fits in.

    Attributes:
        size: numbers that the block must have.
    """

    _GRAIN = 16  # numbers in a line of the caches

    def __init__(self) -> None:
        """Start empty."""
        self.size = 0
        self._taken: dict[int, int] = {}  # start: end

    def take(self, count: int) -> int:
        """Return where `count` numbers may lie until they are given back."""
        start, count = 0, max(count, 1)  # places are told apart by where they start
        for other in sorted(self._taken):
            if start + count <= other:
                break
            start = self._rounded(self._taken[other])
        self._taken[start] = start + count
        self.size = max(self.size, self._rounded(start + count))
        return start

    def give(self, start: int) -> None:
        """Give back what was taken at `start`."""
        del self._taken[start]

    def _rounded(self, end: int) -> int:
        return -(-end // self._GRAIN) * self._GRAIN
