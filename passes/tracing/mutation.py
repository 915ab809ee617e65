"""Mutation: which operations of a graph change a tensor in place, and what must not be moved past them.

1. Where shapes are computed, a graph is run on fake tensors, and what it writes to is seen: by the schema of every
   operation that torch dispatches, whatever it is called by, through views, ``.data``, ``detach``, lists and ``out``.
2. In a graph without shapes it is read off the names and arguments of torch's own operations, and whatever else is
   called (a function of the user's, a leaf module that is not torch's) may write to all that it reads.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.models.values import tensors_in

AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_KEY = "written"
_HOMES = ("torch", "torchvision", "passes", "operator", "_operator", builtins.__name__, "math")


class WriteWatch(TorchDispatchMode):
    """Sees which storages operations write to while it is entered.

    Args:
        most: more operations than these, since `start`, are an error; None sets no limit.

    Attributes:
        seen: the storages written to since `start`.
    """

    supports_higher_order_operators = True

    def __init__(self, most: int | None = None) -> None:
        """Nothing is seen yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = most
        self.start()

    def start(self) -> None:
        """Forget what was seen."""
        self.seen: set[int] = set()
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note what one operation writes to, and run it."""
        self._count += 1
        if self._most is not None and self._count > self._most:
            raise RuntimeError(f"it takes more than {self._most} operations")
        kwargs, arguments = kwargs or {}, getattr(getattr(func, "_schema", None), "arguments", ())
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        statistics = ("running_mean", "running_var") if given.get("training", given.get("train")) else ()
        for argument in arguments:  # those of a norm that trains are not marked as written to
            marked = argument.alias_info is not None and argument.alias_info.is_write
            if marked or argument.name in statistics:
                self.seen |= storages(given.get(argument.name))
        return func(*args, **kwargs)


def storages(value: object) -> set[int]:
    """What identifies the memory of all tensors in a value."""
    strided = (tensor for tensor in tensors_in(value) if tensor.layout is torch.strided)
    return {tensor.untyped_storage()._cdata for tensor in strided}


def note_written(node: fx.Node, written: set[int]) -> None:
    """Keep with a node which storages it writes to, of those that values of the graph have."""
    node.meta[_KEY] = frozenset(written)


def forget_written(node: fx.Node) -> None:
    """Remove what `note_written` kept."""
    node.meta.pop(_KEY, None)


def works_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change a tensor that something else holds."""
    if _KEY in node.meta:
        return bool(node.meta[_KEY])
    return node.op in ("call_module", "call_function", "call_method") and _may_write(graph, node)


def _may_write(graph: fx.GraphModule, node: fx.Node) -> bool:
    """What `works_in_place` says where shapes are not known."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) or not is_as_torch_made_it(module)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in (*AUGMENTED, operator.setitem) or (name.endswith("_") and not name.endswith("__")):
        return True
    if not isinstance(node.target, str) and not is_known(node.target):
        return True
    place = None if isinstance(node.target, str) else _place_of_inplace(node.target)
    told = place is not None and len(node.args) > place and bool(node.args[place])
    return told or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def is_known(function: Any) -> bool:
    """Whether a function is one of torch's, of Python's or of this package."""
    home = getattr(function, "__module__", None) or getattr(type(function), "__module__", "")
    return str(home).partition(".")[0] in _HOMES or "_foreach" in getattr(function, "__name__", "")


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
    own = storages(tensor.meta.get("val"))
    node = first.next
    while node is not last:
        if node.op == "root":
            return False  # `last` comes before `first`
        if own & written_by(graph, node):
            return False
        node = node.next
    return True


def written_by(graph: fx.GraphModule, node: fx.Node) -> set[int]:
    """The storages that a node writes to."""
    if _KEY in node.meta:
        return set(node.meta[_KEY])
    read = [storages(each.meta.get("val")) for each in node.all_input_nodes] if works_in_place(graph, node) else []
    return set().union(*read)


def is_held_elsewhere(tensor: fx.Node, change: fx.Node) -> bool:
    """Whether what a node yields is read under another name behind a node that changes it in place, or by the caller.

    The graph must have shapes. What is made from the changed one is not meant.
    """
    own, behind, node = storages(tensor.meta.get("val")), set(), change
    while node.op != "root":
        behind.add(node)
        node = node.next
    before = [each for each in tensor.graph.nodes if each not in behind and own & storages(each.meta.get("val"))]
    later = any(user in behind and user is not change for each in before for user in each.users)
    return later or any(each.op in ("placeholder", "get_attr") for each in before)
