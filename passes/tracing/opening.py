"""Opening: custom layers in graphs, as a plain layer and what their own code does around it.

A custom layer (`passes.layers.custom`) is traced into. Where its weight goes as it is into one convolution or linear
call of each call of the layer, and nowhere else in the graph, that call becomes a call of a plain layer under the
custom layer's path, and what its code does before and behind it stays in the graph as it is. So no pass after this one
has to know of custom layers. The shape of the weight may be asked for: it is that of the dense layer.

A layer stays closed, a leaf whose insides nobody knows, where torch.fx can't trace its code or where the call is not
always the same; and where its weight is used in another way, which is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import fx, nn

from passes.layers.custom import GroupedCustom, change_of_layer, is_custom, plain_layer
from passes.layers.known.as_torch_made_it import change_of
from passes.layers.known.layer_call import LayerCall, layer_call

BIAS_APART = "sgfx_bias"  # under which graphs find a bias that the user's code adds itself
UNTRACEABLE = ""  # of a layer that stays closed although its weight may be used as it is


def closed_from_the_start(model: nn.Module) -> dict[str, str]:
    """The custom layers that can't be opened whatever their code does: path to the reason."""
    found = {path: _obstacle(module) for path, module in model.named_modules() if is_custom(module)}
    return {path: reason for path, reason in found.items() if reason is not None}


def _obstacle(layer: nn.Module) -> str | None:
    if (change := change_of(layer)) is not None:
        return change
    if not {"weight", "bias"} <= layer._parameters.keys():
        return "its weight is computed (weight_norm, spectral_norm, prune)"
    return change_of_layer(layer)


def custom_layers(root: nn.Module) -> dict[str, nn.Module]:
    """The custom layers in `root`, dense or grouped, by all of their paths."""
    modules = root.named_modules(remove_duplicate=False)
    return {
        path: module for path, module in modules if path and (isinstance(module, GroupedCustom) or is_custom(module))
    }


@contextmanager
def replaced(root: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules at some paths of `root`, holders first, for a while."""
    before = []
    for path, other in others.items():
        holder, _, name = path.rpartition(".")
        registry = root.get_submodule(holder)._modules
        before.append((registry, name, registry[name]))
        registry[name] = other
    try:
        yield
    finally:
        for registry, name, module in reversed(before):
            registry[name] = module


def traceable(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """For each grouped layer the user's own, with a weight of the dense shape that takes no memory."""
    made: dict[int, nn.Module] = {}
    for module in layers.values():
        if isinstance(module, GroupedCustom) and id(module) not in made:
            weight = module.weight.new_zeros(()).expand(module.dense_shape)
            made[id(module)] = module.as_dense(nn.Parameter(weight, requires_grad=False))
    return {path: made[id(module)] for path, module in layers.items() if id(module) in made}


def as_they_are(layers: Mapping[str, nn.Module], opened: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """For each grouped layer that was not opened the user's own, with the weight that it has now."""
    left = {path: layer for path, layer in layers.items() if isinstance(layer, GroupedCustom) and path not in opened}
    return {path: layer.as_dense(nn.Parameter(layer.dense_weight().detach(), False)) for path, layer in left.items()}


def open_layers(
    graph: fx.Graph, layers: Mapping[str, nn.Module], counts: Mapping[str, int], read_outside: Collection[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Put calls of plain layers into `graph`, in which the custom `layers` were traced into.

    Args:
        graph: the graph, as traced.
        layers: the custom layers as they are, by path.
        counts: how often each of them is called.
        read_outside: those whose weight is read by other code than their own.

    Returns:
        The plain layers by path, and the reasons of those that can't be opened (`UNTRACEABLE`: none is known).
    """
    opened, closed = {}, {}
    for path, layer in layers.items():
        if counts.get(path):
            outside = "its weight is read by an operation outside its own call"
            calls = outside if path in read_outside else _calls(graph, path, counts[path])
            if isinstance(calls, str):
                closed[path] = calls
            else:
                opened[path] = _open(graph, path, layer, calls)
    return opened, closed


def _calls(graph: fx.Graph, path: str, count: int) -> dict[fx.Node, LayerCall] | str:
    """The nodes of `graph` that are given the weight of a layer, read as calls; a reason if one is anything else."""
    found: dict[fx.Node, LayerCall] = {}
    within: set[str | None] = set()
    users = [user for node in graph.nodes if _reads(node, f"{path}.weight") for user in node.users]
    for node in users:
        name = getattr(node.target, "__name__", str(node.target))
        call = layer_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None
        if call is None or not _reads(call.weight, f"{path}.weight"):
            return f"its weight is computed first, by {name!r}"
        if (inside := _call_of(node, path)) is None:
            return f"its weight is read by {name!r}, an operation outside its own call"
        if inside in within:
            return "its weight is used more than once"
        within.add(inside)
        found[node] = call
    if len(found) != count:
        return "its weight is not used in each of its calls"
    alike = {(call.kind, _reads(call.bias, f"{path}.bias"), *_numbers(call)) for call in found.values()}
    known = all(call.bias is None or _reads(call.bias, f"{path}.bias") for call in found.values())
    constant = not any(isinstance(x, fx.Node) for numbers in alike for x in _flat(numbers))
    given = all(isinstance(call.input, fx.Node) for call in found.values())
    return found if len(alike) == 1 and known and constant and given else UNTRACEABLE


def _numbers(call: LayerCall) -> tuple[Any, ...]:
    return (*(_plain(value) for value in (call.stride, call.padding, call.dilation)), call.groups)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, tuple) else (value,)


def _reads(node: object, target: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == target


def _call_of(node: fx.Node, path: str) -> str | None:
    """Which call of the module at `path` a node was traced in."""
    stack = node.meta.get("nn_module_stack", {})
    return next((str(key) for key, (name, _) in stack.items() if name == path), None)


def _open(graph: fx.Graph, path: str, layer: nn.Module, calls: Mapping[fx.Node, LayerCall]) -> nn.Module:
    call = next(iter(calls.values()))
    bias = None if call.bias is None else layer.bias
    plain = plain_layer(layer, replace(call, bias=bias))
    for node, each in calls.items():
        with graph.inserting_before(node):
            new = graph.call_module(path, (each.input,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if (_reads(node, f"{path}.weight") or _reads(node, f"{path}.bias")) and not node.users:
            graph.erase_node(node)
        elif _reads(node, f"{path}.bias") and bias is None:  # the plain layer has none
            node.target = f"{path}.{BIAS_APART}"
            plain.register_parameter(BIAS_APART, layer._parameters["bias"])
    return plain
