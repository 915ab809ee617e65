"""Choices: operations that take some of the data by their value, such as the best proposals of a detector.

Behind them, two networks that differ a little may hold other things in the same place, in tensors of the same shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHOOSING = {"topk", "sort", "argsort", "msort", "kthvalue", "argmax", "argmin", "nonzero_numpy", "multinomial", "nms"}


class WatchForChoices(TorchDispatchMode):
    """Notes whether what runs inside chooses by value.

    Attributes:
        seen: whether it did.

    >>> with WatchForChoices() as watch:
    ...     x = torch.arange(3.0).sum()
    >>> watch.seen
    False
    >>> with watch:
    ...     x = torch.arange(3.0).topk(1)
    >>> watch.seen
    True
    """

    def __init__(self) -> None:
        """Nothing is seen yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note one operation, and run it."""
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):  # by number, or by a mask
            self.seen |= any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            self.seen |= name in CHOOSING or torch.Tag.dynamic_output_shape in func.tags
        return func(*args, **(kwargs or {}))
