"""The walk over the dense and the compressed graph in step: every batch passes each node once.

1. Both graphs have the same nodes. The walk stops before the first call of each regrouped layer; all batches reach a
   stop before any goes on, so that what is behind it sees the layer's new weights.
2. A value is dropped after its last reader. Between stops only one batch is in work.
3. What the batches hold at a stop stays below `LIMIT` bytes: batches beyond it are let go of and run again from the
   start at the next stop. It is early stops that hold much, and the way to them is short.
4. A value that is needed ahead of its turn (what a shortcut adds) is computed on the side, where no layer that is still
   to be solved and nothing that works in place lies on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

from torch import fx, nn

from passes.calibration.data import Arguments, single_image
from passes.calibration.value_choices import WatchForChoices
from passes.errors import InputError, let_memory_errors_pass
from passes.layers.grouped import Grouped
from passes.models.copying import copy_inputs
from passes.models.values import shapes_of, tensors_in
from passes.tracing.interpreter import Interpreter
from passes.tracing.mutation import works_in_place
from passes.tracing.operations import module_of
from passes.tracing.shapes import find_shapes
from passes.tracing.tracer import join

Pair: TypeAlias = tuple[Arguments, Arguments]  # for the dense and for the compressed graph

LIMIT = 3 << 29  # bytes of values that batches hold at a stop


class Walk:
    """Takes batches through a dense and a compressed graph, from stop to stop.

    Args:
        dense: an eval graph.
        small: the eval graph of a compressed form of the same model.
        batches: the positional arguments of every batch for both graphs; asked for again where a batch starts anew.
        path: of the traced part in the model, for messages.
        limit: bytes of values that the batches may hold at a stop.

    Raises:
        InputError: the graphs have different nodes.
    """

    def __init__(
        self,
        dense: fx.GraphModule,
        small: fx.GraphModule,
        batches: Sequence[Pair],
        path: str = "",
        limit: int = LIMIT,
    ) -> None:
        """Compare the graphs, and note where each value is read last."""
        self.nodes = list(dense.graph.nodes)
        twins = list(small.graph.nodes)
        if [(n.op, str(n.target)) for n in self.nodes] != [(n.op, str(n.target)) for n in twins]:
            raise InputError("small is no compressed form of dense: torch.fx finds other operations in it")
        self.graphs = (dense, small)
        self.twins = dict(zip(self.nodes, twins, strict=True))
        self.replays = (Interpreter(dense), Interpreter(small))
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.last = {node: max((self.position[user] for user in node.users), default=-1) for node in self.nodes}
        self.batches = batches
        find_shapes(dense, batches[0][0])  # which shows what works in place
        self._path = path
        self._held: list[Held | None] = [None] * len(batches)
        self._limit = limit

    def stops(self) -> Iterator[fx.Node]:
        """The first call of each regrouped layer, in order of execution."""
        seen = set()
        for node in self.nodes:
            if isinstance(self.module(node), Grouped) and node.target not in seen:
                seen.add(node.target)
                yield node

    def calls_with(self, stop: fx.Node) -> list[fx.Node]:
        """The calls of the layer at `stop` whose inputs can be known there, itself included."""
        calls = [node for node in self.nodes if node.op == "call_module" and node.target == stop.target]
        return [node for node in calls if self.route(stop, node.all_input_nodes) is not None]

    def at(self, stop: fx.Node) -> Iterator[Held]:
        """Bring every batch before `stop`, one after the other."""
        total = sum(held.nbytes for held in self._held if held is not None)
        for index, before in enumerate(self._held):
            total -= 0 if before is None else before.nbytes
            held, self._held[index] = before or Held(self, self.batches[index]), None
            held.advance(self.position[stop])
            if total + held.nbytes <= self._limit:
                self._held[index] = held
                total += held.nbytes
            yield held

    def route(self, stop: fx.Node, wanted: Collection[fx.Node]) -> list[fx.Node] | None:
        """The nodes from `stop` on that lead to `wanted`, in order; None if they can't be computed on the side."""
        found: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            if self.position[node] < self.position[stop]:
                if self.last[node] < self.position[stop]:
                    return None  # dropped: its readers are done with it
            elif isinstance(self.module(node), Grouped) or works_in_place(self.graphs[0], node):
                return None
            elif node not in found:
                found.add(node)
                todo += node.all_input_nodes
        return sorted(found, key=self.position.__getitem__)

    def name(self, node: fx.Node) -> str:
        """The path in the model of the module that a node calls."""
        return join(self._path, str(node.target))

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls in the compressed graph, or None if it calls none."""
        return module_of(self.graphs[1], self.twins[node])


class Held:
    """One batch on its way through both graphs, and the values that it still needs.

    Attributes:
        chosen: whether the dense graph has chosen some of the data by their value up to here, so that rows of the two
            graphs may not belong together.
    """

    def __init__(self, walk: Walk, arguments: Pair) -> None:
        """Start with the arguments of the batch."""
        self._walk = walk
        placeholders = [node for node in walk.nodes if node.op == "placeholder"]
        theirs, mine = (_bound(placeholders, copy_inputs(given)) for given in arguments)
        self._values = theirs, mine
        self._next = 0
        self.chosen = False
        self._shapes, self._hint = shapes_of(arguments[1]), single_image(arguments[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        held = [x for side in self._values for x in tensors_in(list(side.values()))]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
        return sum(storages.values())

    def advance(self, position: int) -> None:
        """Compute all nodes before `position`, dropping what nobody reads any more."""
        for side in (0, 1):
            with WatchForChoices() as watch:
                for node in self._walk.nodes[self._next : position] if self._next < position else ():
                    if node.op not in ("placeholder", "output"):
                        self._values[side][node] = self._compute(side, node, self._values[side])
                    for each in (node, *node.all_input_nodes):
                        if self._walk.last[each] <= self._walk.position[node]:
                            self._values[side].pop(each, None)
            self.chosen |= watch.seen
        self._next = position

    def value(self, side: int, node: fx.Node, stop: fx.Node) -> Any:
        """The value of `node` in the dense (0) or the compressed (1) graph, while the batch stands before `stop`.

        It must be one that `Walk.route` finds, or a call of the layer at `stop`.
        """
        values = dict(self._values[side])
        if node in values:
            return values[node]
        called = isinstance(self._walk.module(node), Grouped)
        route = self._walk.route(stop, node.all_input_nodes if called else [node]) or []
        for each in [*route, node] if called else route:
            values[each] = self._compute(side, each, values)
        return values[node]

    def _compute(self, side: int, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        replay = self._walk.replays[side]
        twin = node if side == 0 else self._walk.twins[node]
        own = {(n if side == 0 else self._walk.twins[n]): values[n] for n in node.all_input_nodes}
        replay.env = own
        try:
            return replay.run_node(twin)
        except Exception as error:
            let_memory_errors_pass(error)
            where = f"at layer {self._walk.name(node)!r}" if node.op == "call_module" else f"at {node.name!r}"
            raise InputError(
                f"data of shape {self._shapes} does not fit the model {where}: {error}{self._hint}"
            ) from error


def _bound(placeholders: list[fx.Node], given: Arguments) -> dict[fx.Node, Any]:
    """What each placeholder of a graph stands for, where it is called with these arguments by position."""
    found: dict[fx.Node, Any] = {}
    left = list(given)
    for node in placeholders:
        name = str(node.target)
        if name.startswith("*"):
            found[node], left = ({}, left) if name.startswith("**") else (tuple(left), [])
        elif left:
            found[node] = left.pop(0)
        elif node.args:
            found[node] = node.args[0]
        else:
            raise InputError(f"the data give no value for the argument {name!r} of the model's forward")
    return found
