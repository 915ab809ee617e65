"""Splitting: a custom layer that stays closed in graphs, as what is before its call, the call, and what is behind.

torch.fx can't trace such code, but running it shows all that calibration asks for: what the call reads and gives. Its
code is run twice: up to the call, on copies, and with the call's result given. That is right whatever way it takes for
the data at hand; nothing of it is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from passes.errors import InputError
from passes.layers.custom import GroupedCustom, is_custom, plain_layer
from passes.layers.known.layer_call import CallsWith, LayerCall
from passes.models.copying import copy_inputs, unhooked_copy
from passes.tracing.probing import call_of


class _ReachedError(BaseException):
    """The call was reached. No Exception, which the code around it might catch."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.call = call


class Before(nn.Module):
    """The code of a layer up to its call: gives what the call reads, and the plain layer the geometry of the call."""

    def __init__(self, layer: nn.Module, plain: nn.Module) -> None:
        """Take a custom layer, and the plain layer that stands for its call."""
        super().__init__()
        self._held = unhooked_copy(layer), plain  # in a tuple: not to be found among the modules of the graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the code on copies of its arguments."""
        layer, plain = self._held
        args, kwargs = copy_inputs((args, kwargs))
        weight: Any = layer.weight
        try:
            with CallsWith(weight, _stop):
                layer(*args, **kwargs)
        except _ReachedError as reached:
            plain.__dict__.update(reached.call.geometry)
            return reached.call.input
        raise InputError(f"the code of {type(layer).__name__} does not use its weight on these data")


def _stop(call: LayerCall) -> Tensor:
    raise _ReachedError(call)


class Behind(nn.Module):
    """The code of a layer behind its call, whose result is the first argument."""

    def __init__(self, layer: nn.Module) -> None:
        """Take a custom layer."""
        super().__init__()
        self._held = (layer,)

    def forward(self, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the code with the call's result given."""
        layer: Any = self._held[0]
        with CallsWith(layer.weight, lambda _: y):
            return layer(*args, **kwargs)


def split(dense: fx.GraphModule, small: fx.GraphModule, part: nn.Module) -> None:
    """Split the closed grouped layers in the eval graphs of a dense and a compressed model, in place, alike in both.

    Args:
        dense: of the dense model.
        small: of the compressed one.
        part: what `small` was traced from.
    """
    calls = [str(node.target) for node in dense.graph.nodes if node.op == "call_module"]
    for path in {path for path in calls if calls.count(path) == 1}:
        layer = dense.get_submodule(path)
        if is_custom(layer) and (call := call_of(layer)) is not None:
            grouped = part.get_submodule(path)
            if isinstance(grouped, GroupedCustom):
                _split(dense, path, layer, call)
                _split(small, path, grouped, call)


def _split(graph: fx.GraphModule, path: str, layer: Any, call: LayerCall) -> None:
    whole = graph.get_submodule(path)
    plain = plain_layer(layer, LayerCall(call.kind, None, None, None if call.bias is None else layer.bias))
    plain.add_module("sgfx_before", Before(whole, plain))
    plain.add_module("sgfx_behind", Behind(whole))
    graph.set_submodule(path, plain)
    node = next(node for node in graph.graph.nodes if node.op == "call_module" and node.target == path)
    with graph.graph.inserting_before(node):
        read = graph.graph.call_module(f"{path}.sgfx_before", node.args, node.kwargs)
        y = graph.graph.call_module(path, (read,))
        given = graph.graph.call_module(f"{path}.sgfx_behind", (y, *node.args), node.kwargs)
    for each in (read, y, given):
        each.meta.update(node.meta)
    node.replace_all_uses_with(given)
    graph.graph.erase_node(node)
    graph.recompile()
