"""Nothing: what does nothing in eval mode goes: identity, and dropout that is off."""

from __future__ import annotations

from torch import fx

from passes.freezing.rewrites.rewrite import SHAPES, Rewrite, graph_of
from passes.infra.compilation import Compilation
from passes.tracing.operations import module_of, passes_on

TRAINING_ARGUMENT = {"dropout": 2, "dropout1d": 2, "dropout2d": 2, "dropout3d": 2, "stochastic_depth": 3}


class DropNothing(Rewrite):
    """Take identity and dropout out of a graph."""

    name = "drop nothing"
    requires = (SHAPES,)

    def run(self, compilation: Compilation) -> None:
        """Let those who read what does nothing read what that reads."""
        graph = graph_of(compilation)
        for node in list(graph.graph.nodes):
            if passes_on(module_of(graph, node)) or (node.op == "call_function" and _is_off(node)):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.graph.erase_node(node)
        graph.delete_all_unused_submodules()
        graph.recompile()


def _is_off(node: fx.Node) -> bool:
    """Whether a function that only does something in training was called outside of it."""
    place = TRAINING_ARGUMENT.get(getattr(node.target, "__name__", ""))
    if place is None or len(node.all_input_nodes) != 1:
        return False
    return (node.args[place] if len(node.args) > place else node.kwargs.get("training")) is False
