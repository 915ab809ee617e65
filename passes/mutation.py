"""Mutation: which operations of a graph may change a tensor in place, and what must not be moved past them."""

from __future__ import annotations

import inspect
import operator
from functools import cache
from typing import Any

from torch import fx

from passes.values import tensors_in

AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def works_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change one of the tensors that it reads."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in (*AUGMENTED, operator.setitem) or (name.endswith("_") and not name.endswith("__")):
        return True
    place = None if isinstance(node.target, str) else _place_of_inplace(node.target)
    told = place is not None and len(node.args) > place and bool(node.args[place])
    return told or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


@cache
def _place_of_inplace(function: Any) -> int | None:
    """Where a function takes the argument ``inplace``, or None if it takes none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def is_unchanged(graph: fx.GraphModule, tensor: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether what a node yields is the same at `last` as at `first`: then a reader may be moved there.

    The graph must have shapes: fake tensors share storage where real ones would.
    """
    own = _storages(tensor)
    node = first.next
    while node is not last:
        if node.op == "root":
            return False  # `last` comes before `first`
        if works_in_place(graph, node) and any(own & _storages(read) for read in node.all_input_nodes):
            return False
        node = node.next
    return True


def _storages(node: fx.Node) -> set[int]:
    return {value.untyped_storage()._cdata for value in tensors_in(node.meta.get("val"))}
