"""Layouts: where code asks how a tensor lies in memory, it lies there as in the model.

The library may compute a layer with the channels last in memory, and the kernel never does. Most operations don't care;
some do:

1. ``view`` and its relatives fail on other strides, ``stride`` and ``is_contiguous`` tell of them;
2. ``reshape`` and its relatives give a view or a copy by the strides, which matters where something writes to either;
3. functions and modules of the user's, and whoever calls the model, may do any of these.

What a layer or pooling makes is put into the layout that the model has there if such an operation reads it, directly or
through others that pass the layout on. Where it lies so already, that is nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.rewrite import SHAPES, Rewrite, graph_of
from passes.infra.compilation import Compilation
from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.tracing.mutation import is_known, storages, written_by

_ASKING = {
    "view", "view_as", "as_strided", "as_strided_", "view_as_complex", "stride", "is_contiguous", "storage_offset",
    "data_ptr", "storage", "untyped_storage", "numpy", "set_", "resize_",
}  # fmt: skip
_VIEW_OR_COPY = {"reshape", "reshape_as", "flatten", "ravel", "contiguous", "unflatten", "to", "type_as"}
_MODULES_VIEW_OR_COPY = (nn.Flatten, nn.Unflatten)
_MAKERS = (Recipe, nn.MaxPool2d, nn.AvgPool2d)


class KeepLayouts(Rewrite):
    """Put what layers make into the layout of the model where that matters."""

    name = "keep layouts"
    requires = (SHAPES,)

    def run(self, compilation: Compilation) -> None:
        """Go through what layers and poolings make."""
        graph = graph_of(compilation)
        for node in held(graph):
            if _is(graph, node, _MAKERS):
                _put_as_in_model(graph, node)
        graph.recompile()


def held(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph of which the layout of what they yield matters."""
    nodes = list(graph.graph.nodes)
    written = set().union(*(written_by(graph, node) for node in nodes))
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(_asks(graph, user, written) or (user in found and not _is(graph, user, Recipe)) for user in node.users):
            found.add(node)
    return [node for node in nodes if node in found]


def _is(graph: fx.GraphModule, node: fx.Node, kinds: Any) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), kinds)


def _asks(graph: fx.GraphModule, node: fx.Node, written: set[int]) -> bool:
    """Whether what a node does depends on the layout of what it reads."""
    if node.op == "output":
        return True
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        known = isinstance(module, Recipe | FusedNorm) or is_as_torch_made_it(module)
        return not known or (isinstance(module, _MODULES_VIEW_OR_COPY) and _is_written(node, written))
    if node.op == "call_function" and not is_known(node.target):
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _ASKING or (name in _VIEW_OR_COPY and _is_written(node, written))


def _is_written(node: fx.Node, written: set[int]) -> bool:
    """Whether something writes to what a node yields or reads."""
    return any(storages(each.meta.get("val")) & written for each in (node, *node.all_input_nodes))


def _put_as_in_model(graph: fx.GraphModule, node: fx.Node) -> None:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() != 4:
        return  # pools that give indices are left to the library, and others lie in one way
    layout = torch.contiguous_format if value.is_contiguous() else torch.channels_last
    with graph.graph.inserting_after(node):
        new = graph.graph.call_method("contiguous", (node,), {"memory_format": layout})
    new.meta["val"] = value
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
