"""The one call that a layer's weight goes into: read off an operation, and computed by another function.

A user's subclass of a torch layer may do what it likes around a call of ``conv1d``, ``conv2d``, ``conv3d`` or
``linear``. What these are called with is a `LayerCall`, whether it is seen in a graph or while the code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _ntuple
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.errors import InputError

_CALLS: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.linear: nn.Linear,
}  # fmt: skip
# Attributes that a regrouped layer's parameter has in common with the dense one's.
SAME_FOR_ALL_FORMS = {"dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "is_quantized"}
# What may be asked of a weight without looking at its values.
SAME_FOR_ALL_VALUES = SAME_FOR_ALL_FORMS | {"shape", "size", "dim", "ndim", "numel", "nelement", "__len__"}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DIMS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class LayerCall:
    """A call of one of torch's functions that layers are made of, with tensors or with nodes of a graph."""

    kind: type[nn.Module]
    input: Any
    weight: Any
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: Any = 1

    @property
    def geometry(self) -> dict[str, Any]:
        """Stride, padding and dilation as torch's layers have them; nothing for a linear layer."""
        if self.kind not in _DIMS:
            return {}
        spread: Any = _ntuple(_DIMS[self.kind])  # type: ignore[no-untyped-call]
        given = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {key: value if isinstance(value, str) else tuple(spread(value)) for key, value in given.items()}


def layer_call(function: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall | None:
    """Read a call of ``conv1d``, ``conv2d``, ``conv3d`` or ``linear``; None if it is none of them."""
    kind = _CALLS.get(function) if callable(function) else None
    if kind is None:
        return None
    return LayerCall(kind, **dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs))


class CallsWith(TorchFunctionMode):
    """Computes the calls that are given a weight by another function, while it is entered.

    Args:
        weight: the weight to look for.
        compute: what to do with such a call.
        alone: refuse all other operations on the weight, which has no values; its shape may be asked for.
    """

    def __init__(self, weight: Tensor, compute: Callable[[LayerCall], Tensor], *, alone: bool = False) -> None:
        """Take the weight to look for, and what to do with a call of it."""
        super().__init__()
        self._weight, self._compute, self._alone = weight, compute, alone

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See what an operation is given, and do it."""
        call = layer_call(func, args, kwargs or {})
        if call is not None and call.weight is self._weight and call.groups == 1:
            return self._compute(call)
        if self._alone and operation_on(self._weight, func, args, kwargs) is not None:
            raise InputError(f"the code of a layer does something with its weight beside one call: {func}")
        return func(*args, **(kwargs or {}))


def operation_on(weight: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> str | None:
    """The name of an operation that is given `weight`, and asks for more than what all weights of its shape have."""
    name = getattr(getattr(func, "__self__", None), "__name__", "") or getattr(func, "__name__", repr(func))
    given = any(each is weight for each in pytree.tree_leaves((args, kwargs)))
    return name if given and name not in SAME_FOR_ALL_VALUES else None
