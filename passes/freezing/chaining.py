"""Chaining: packed layers that follow each other in the graph become one module, which runs them in one call.

1. Layers take part as long as no other operation stands between them in the order of the graph.
2. What a later operation reads is an output of the chain; all else stays within it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from passes.kernel import PackedConv2d


def chain(graph: fx.GraphModule) -> None:
    """Put packed layers of `graph` that follow each other into chains, in place."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.graph.nodes:
        if _is_packed(graph, node):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    for index, run in enumerate(run for run in runs if len(run) > 1):
        _put_together(graph, run, f"chain_{index}")
    graph.graph.lint()
    graph.recompile()


def _is_packed(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a packed convolution; by its name, since the kernel is imported only where it is used."""
    return node.op == "call_module" and type(graph.get_submodule(str(node.target))).__name__ == "PackedConv2d"


def _put_together(graph: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    from passes.kernel.chain import PackedChain

    inside = set(run)
    inputs = list(dict.fromkeys(read for node in run for read in node.all_input_nodes if read not in inside))
    number = {node: index for index, node in enumerate((*inputs, *run))}
    reads = []
    for node in run:
        read, added = (*node.args, None)[:2]
        reads.append((number[read], None if added is None else number[added]))  # type: ignore[index]
    outputs = [index for index, node in enumerate(run) if any(user not in inside for user in node.users)]
    layers: list[PackedConv2d] = [graph.get_submodule(str(node.target)) for node in run]  # type: ignore[misc]
    graph.add_submodule(name, PackedChain(layers, reads, outputs))
    with graph.graph.inserting_after(run[-1]):
        whole = graph.graph.call_module(name, tuple(inputs))
    for position, index in enumerate(outputs):
        result = whole
        if len(outputs) > 1:
            with graph.graph.inserting_after(whole):
                result = graph.graph.call_function(operator.getitem, (whole, position))
        run[index].replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
