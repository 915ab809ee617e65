"""Probing: a custom layer whose code torch.fx can't trace is run on fake tensors, to see how it uses its weight.

Nothing is computed, and only sizes decide which way the code takes (padding as TensorFlow does asks for them). In eval
and in train mode the weight must go as it is into one call of the layer's own kind; its shape may be asked for. With
other sizes the code may take another way: the masked and the grouped form still compute what the layer computes with
its masked weight, since they run its code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from passes.errors import let_memory_errors_pass
from passes.infra.random_state import own_random_state
from passes.layers.known.layer_call import LayerCall, layer_call, operation_on
from passes.models.copying import unhooked_copy
from passes.models.values import mapped, shapes_of

Arguments: TypeAlias = tuple[tuple[object, ...], dict[str, object]]


def misuse(layer: nn.Module, calls: Iterable[Arguments]) -> str | None:
    """Say how a custom layer uses its weight otherwise than in one call, or None if it does not.

    Args:
        layer: the layer; it is neither run nor changed.
        calls: what it is called with; if nothing is known, an input is guessed.
    """
    for arguments in list(calls) or [((_guess(layer),), {})]:
        for training in (False, True):
            try:
                uses = _run(layer, arguments, training)
            except Exception as error:
                let_memory_errors_pass(error)
                why = str(error).partition("\n")[0] or type(error).__name__
                return f"its code can't be traced, nor run on {shapes_of(arguments[0])}: {why}"
            if uses.other is not None:
                return f"its weight is computed first, by {uses.other!r}"
            if len(uses.calls) != 1:
                return f"its weight is used {len(uses.calls)} times"
            if uses.calls[0].groups != 1:
                return "its call has groups"
    return None


def call_of(layer: nn.Module) -> LayerCall | None:
    """The one call in eval mode that the weight of a layer goes into, on a guessed input; None if it isn't so.

    Its bias is the layer's own, or None.
    """
    try:
        uses = _run(layer, ((_guess(layer),), {}), training=False)
    except Exception as error:
        let_memory_errors_pass(error)
        return None
    call = uses.calls[0] if len(uses.calls) == 1 and uses.other is None else None
    if call is None or not (call.bias is None or call.bias is uses.bias):
        return None
    own: Any = layer
    return replace(call, weight=own.weight, bias=None if call.bias is None else own.bias)


def _run(layer: nn.Module, arguments: Arguments, training: bool) -> _Uses:
    """Run a layer on fake tensors, and see how it uses its weight."""
    twin: Any = unhooked_copy(layer).train(training)
    uses, mode = _Uses(twin.weight, twin.bias), FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = mapped(arguments, mode.from_tensor)
    with own_random_state(), torch.no_grad(), mode, uses:
        twin(*args, **kwargs)
    return uses


class _Uses(TorchFunctionMode):
    """Notes how `weight` is used: the calls that it is the weight of, and the first other operation."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.calls: list[LayerCall] = []
        self.other: str | None = None

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = layer_call(func, args, kwargs or {})
        if call is not None and call.weight is self.weight and call.input is not self.weight:
            self.calls.append(call)
        elif self.other is None:
            self.other = operation_on(self.weight, func, args, kwargs)
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
