"""A rewrite: a pass over an eval graph, whose nodes have shapes. What all rewrites know and leave behind.

1. The compilation's model is the graph. Every node has the shape of what it gives, for the inputs in `SHAPES`, under
   ``meta["val"]``; a tensor may lie in a plane with margins (see `placing`), its shape speaks of the picture alone.
2. A rewrite leaves shapes that are true: those of layers and norms follow from what they read, and what the graph gives
   has the shapes it had. Every rewrite is asked for that after it ran.
3. A `Rule` looks at one place after the other. It says of each that it is made for what it did not do there, and why.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, fx, nn

from passes.freezing.choosing.recipe import FusedNorm, Recipe, call_name
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.channel_cut import channel_counts
from passes.layers.known.geometry import output_sizes, spatial_dims
from passes.models.values import tensors_in
from passes.tracing.operations import module_of
from passes.tracing.tracer import join

PART = Fact[str]("part")  # path of the graph's root in the model
SHAPES = Fact[tuple[object, ...]]("shapes")  # what the graph is called with; for this, all nodes have true shapes
PLAIN_INPUTS = Fact[bool]("plain inputs")  # known as long as no layer keeps its inputs between ends
UNFUSED = Fact[Mapping[str, str]]("unfused")  # what could not be fused, by name, and why: in a user's words
_NAME = "unfused"  # in a node's meta: the name that is used there


class Rewrite(Pass):
    """A pass over a graph that has shapes, in place."""

    def check(self, compilation: Compilation) -> str | None:
        """The graph is whole, and its shapes are true as far as its layers tell."""
        graph = graph_of(compilation)
        graph.graph.lint()
        return false_shape(graph)


class Place(NamedTuple):
    """A node that a rule looks at.

    Attributes:
        graph: where it stands.
        node: the node.
        part: path of the graph's root in the model.
    """

    graph: fx.GraphModule
    node: fx.Node
    part: str

    @property
    def module(self) -> nn.Module | None:
        """The module that is called there, or None."""
        return module_of(self.graph, self.node)

    @property
    def path(self) -> str:
        """Path in the model of the module that is called there."""
        return join(self.part, str(self.node.target))

    def put(self, module: nn.Module) -> None:
        """Call another module there, with the same arguments."""
        name = f"frozen.{self.node.name}"
        self.graph.add_submodule(name, module)
        with self.graph.graph.inserting_before(self.node):
            self.replace(self.graph.graph.call_module(name, self.node.args))

    def replace(self, other: fx.Node) -> None:
        """Let all who read the node read another, which gives what it gave, and take it out."""
        other.meta.update(self.node.meta)
        self.node.replace_all_uses_with(other)
        self.graph.graph.erase_node(self.node)


class Rule(Rewrite):
    """A rewrite of places that have nothing to do with each other, such as all sums, in the order of the graph."""

    requires: ClassVar[tuple[Fact[Any], ...]] = (PART, SHAPES, UNFUSED)
    ensures: ClassVar[tuple[Fact[Any], ...]] = (UNFUSED,)

    @abstractmethod
    def applies(self, place: Place) -> bool:
        """Whether the rule is about such a node at all."""

    @abstractmethod
    def obstacle(self, place: Place) -> str | None:
        """Why it can't be done there, in words that can stand behind "not fused: "; None if it can."""

    @abstractmethod
    def rewrite(self, place: Place) -> None:
        """Do it."""

    def run(self, compilation: Compilation) -> Facts:
        """Go through the graph, and note what stays as it is."""
        return {UNFUSED: self.walk(compilation, compilation[UNFUSED])}

    def walk(self, compilation: Compilation, known: Mapping[str, str]) -> dict[str, str]:
        """Do what can be done; returns the reasons that are `known`, with new ones, and without what is done now."""
        graph, unfused = graph_of(compilation), dict(known)
        for node in list(graph.graph.nodes):
            place = Place(graph, node, compilation[PART])
            if not self.applies(place):
                continue
            reason = self.obstacle(place)
            if reason is None:
                unfused.pop(node.meta.get(_NAME, ""), None)
                self.rewrite(place)
            else:
                name = node.meta.setdefault(_NAME, call_name(_name_of(place), unfused))
                unfused[name] = f"{unfused[name]}, and {reason}" if name in unfused else reason
        graph.delete_all_unused_submodules()
        graph.recompile()
        return unfused


def graph_of(compilation: Compilation) -> fx.GraphModule:
    """The graph that is being rewritten."""
    return cast(fx.GraphModule, compilation.model)


def recipe_of(graph: fx.GraphModule, node: object) -> Recipe | None:
    """The recipe that a node calls, or None if it calls none."""
    module = module_of(graph, node) if isinstance(node, fx.Node) else None
    return module if isinstance(module, Recipe) else None


def other_readers(node: fx.Node, what: str) -> str | None:
    """Why one reader can't change what a node gives, which is called `what`: there are others; None if there aren't."""
    count = len(node.users)
    return None if count == 1 else f"{what} is read {'twice' if count == 2 else f'{count} times'}"


def _name_of(place: Place) -> str:
    """What a user knows a place by: the path of a module, or an operation and the module in whose forward it stands."""
    if place.module is not None:
        return place.path
    stack = list(place.node.meta.get("nn_module_stack", {}).values())
    owner = join(place.part, stack[-1][0] if stack else "")
    return f"{place.node.name} in {owner}" if owner else place.node.name


def false_shape(graph: fx.GraphModule) -> str | None:
    """What is wrong with the shapes of a graph, as far as its recipes, norms and outputs tell; None if nothing is."""
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if isinstance(module, Recipe | FusedNorm):
            read, given = shape_of(node.all_input_nodes[0]), shape_of(node)
            wanted = _result_shape(module.layer, read) if isinstance(module, Recipe) else read
            if given != wanted or not given:
                return f"{node.name} is said to give {given}, and makes {wanted} of {read}"
    output = next(iter(reversed(graph.graph.nodes)))
    now = [tuple(x.shape) for x in tensors_in(fx.map_arg(output.args[0], lambda node: node.meta["val"]))]
    before = [tuple(x.shape) for x in tensors_in(output.meta["val"])]
    return None if now == before else f"the graph gives {now}, and gave {before}"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node gives; () if that is no tensor, or one without dimensions."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _result_shape(layer: nn.Module, read: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a layer makes of an input; () where it can't read it."""
    filters, inputs = channel_counts(layer)
    channels = len(read) - 1 - spatial_dims(layer)
    if channels < 0 or read[channels] != inputs:
        return ()
    sizes = output_sizes(layer, read[channels + 1 :]) if spatial_dims(layer) else []
    return (*read[:channels], filters, *sizes)
