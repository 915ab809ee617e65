"""Probing: a custom layer whose code torch.fx can't trace is run on fake tensors, to see how it uses its weight.

Nothing is computed, and only sizes decide which way the code takes (padding as TensorFlow does asks for them). In eval
and in train mode the weight must go as it is into one call of the layer's own kind; its shape may be asked for. With
other sizes the code may take another way: the masked and the grouped form still compute what the layer computes with
its masked weight, since they run its code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.copying import shadow
from passes.layers.custom import layer_call, operation_on
from passes.random_state import preserved_random_state

Arguments: TypeAlias = tuple[tuple[object, ...], dict[str, object]]


def misuse(layer: nn.Module, calls: Iterable[Arguments]) -> str | None:
    """Say how a custom layer uses its weight otherwise than in one call, or None if it does not.

    Args:
        layer: the layer; it is neither run nor changed.
        calls: what it is called with; if nothing is known, an input is guessed.
    """
    twin: Any = shadow(layer)
    for args, kwargs in list(calls) or [((_guess(layer),), {})]:
        for training in (False, True):
            uses = _Uses(twin.train(training).weight)
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            given = pytree.tree_map(
                lambda x, mode=mode: mode.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs)
            )
            try:
                with preserved_random_state(), torch.no_grad(), mode, uses:
                    twin(*given[0], **given[1])
            except Exception as error:
                why = str(error).partition("\n")[0] or type(error).__name__
                return f"its code can't be traced, nor run on {_shapes(args)}: {why}"
            if uses.other is not None:
                return f"its weight is computed first, by {uses.other!r}"
            if uses.calls != [1]:
                return f"its weight is used {len(uses.calls)} times" if len(uses.calls) != 1 else "its call has groups"
    return None


class _Uses(TorchFunctionMode):
    """Notes how `weight` is used: the groups of each call that it is the weight of, and the first other operation."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.calls: list[int] = []
        self.other: str | None = None

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = layer_call(func, args, kwargs or {})
        if call is not None and call.weight is self.weight and call.input is not self.weight:
            self.calls.append(call.groups)
        else:
            self.other = self.other or operation_on(self.weight, func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _guess(layer: nn.Module) -> Tensor:
    """An input of two examples that a layer of torch's would take."""
    weight: Any = layer.weight
    one: Tensor = weight.new_empty(())
    if isinstance(layer, nn.Linear):
        return one.expand(2, layer.in_features)
    conv: Any = layer
    geometry = zip(conv.kernel_size, conv.dilation, conv.stride, strict=False)
    sizes = [max(32, (kernel - 1) * dilation + 1 + stride) for kernel, dilation, stride in geometry]
    return one.expand(2, conv.in_channels, *sizes)


def _shapes(args: tuple[object, ...]) -> str:
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in args)
