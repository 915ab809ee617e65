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
    tensor = torch.empty(shape)
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
