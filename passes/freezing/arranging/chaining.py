"""Chaining: steps that follow each other in the graph become one module, which runs them in one call.

1. Packed layers and other steps (see `stepping`) take part as long as no other operation stands between them in the
   order of the graph.
2. Of a concatenation that grows (see `concatenation`), a step that adds nothing but results of the chain is part of it
   too: the layers write where the step would copy, and read the channels that are there by then.
3. What a later operation reads is an output of the chain; all else stays within it.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from passes.freezing.arranging.stepping import rows, steps_of
from passes.freezing.choosing.choosing import LAYERS
from passes.freezing.rewrites.concatenation import append
from passes.freezing.rewrites.rewrite import SHAPES, graph_of
from passes.infra.compilation import Compilation, Pass
from passes.kernel.packed_chain import PackedChain
from passes.kernel.program import Wires


class Chaining(Pass):
    """Run steps that follow each other in one call."""

    name = "chaining"
    requires = (SHAPES, LAYERS)
    ends = (SHAPES,)  # of a chain nobody says what it gives

    def run(self, compilation: Compilation) -> None:
        """Find those that follow each other, and put them together."""
        chain(graph_of(compilation))

    def check(self, compilation: Compilation) -> str | None:
        """None are left that follow each other."""
        packed = steps_of(graph_of(compilation))
        left = (node for node in packed if node.next in packed)
        return next((f"{node.name} is not in one call with what follows it" for node in left), None)


def chain(graph: fx.GraphModule) -> None:
    """Put steps of `graph` that follow each other into chains, in place."""
    long = [row for row in rows(graph, set()) if sum(node.op == "call_module" for node in row) > 1]
    for index, row in enumerate(long):
        _put_together(graph, row, f"chain_{index}")
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def _put_together(graph: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    layers = [node for node in run if node.op == "call_module"]
    steps = [node for node in run if node.op != "call_module"]
    # A step is the tensor that it adds to.
    tensors = {node: node.args[0] if node in steps else node for node in (*run, *_read_by(run))}
    inputs = list(dict.fromkeys(tensor for tensor in tensors.values() if tensor not in layers))
    numbers = {tensor: index for index, tensor in enumerate((*inputs, *layers))}
    wires = _wires(layers, steps, {node: numbers[tensor] for node, tensor in tensors.items()})
    outside = [node for node in run if any(user not in run for user in node.users)]
    outputs = [index for index, node in enumerate(layers) if node in outside]
    packed: Any = [graph.get_submodule(str(node.target)) for node in layers]
    graph.add_submodule(name, PackedChain(packed, wires, outputs))
    with graph.graph.inserting_after(run[-1]):
        whole = graph.graph.call_module(name, tuple(inputs))
    for node in reversed(outside):  # each is put right behind the chain, so that they stand in order
        with graph.graph.inserting_after(whole):
            result = _result(graph.graph, node, whole, [layers[index] for index in outputs])
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in run)
    for node in reversed(run):
        graph.graph.erase_node(node)


def _read_by(run: list[fx.Node]) -> list[fx.Node]:
    return [read for node in run for read in node.all_input_nodes if read not in run]


def _wires(layers: list[fx.Node], steps: list[fx.Node], numbers: dict[fx.Node, int]) -> list[Wires]:
    """What each layer reads, adds and writes."""
    into: dict[fx.Node, tuple[int, int]] = {}
    for step in steps:
        parts, first = step.args[1:]
        for part in parts:  # type: ignore[union-attr]
            into[part] = (numbers[step], first)  # type: ignore[assignment,index]
            first += part.meta["val"].shape[1]  # type: ignore[union-attr]
    found = []
    for node in layers:
        read, added = (*node.args, None)[:2]
        found.append(Wires(numbers[read], None if added is None else numbers[added], into.get(node)))  # type: ignore[index]
    return found


def _result(graph: fx.Graph, node: fx.Node, whole: fx.Node, outputs: list[fx.Node]) -> fx.Node:
    """What a later operation reads instead of a node of the chain."""
    if node.target is append:
        joined, parts, first = node.args
        channels = first + sum(part.meta["val"].shape[1] for part in parts)  # type: ignore[union-attr,operator]
        return graph.call_function(append, (joined, [], channels))
    return whole if len(outputs) == 1 else graph.call_function(operator.getitem, (whole, outputs.index(node)))
