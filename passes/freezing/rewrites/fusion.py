"""Fusion: an eval graph with as few passes over its tensors as possible.

1. Dropout and identity are taken out.
2. A norm in eval mode behind a layer that nobody else reads is folded into the layer.
3. A sum behind a layer that nobody else reads is computed by the layer, which starts from the other summand; a
   regrouped layer is preferred, else the later one. Both summands must follow the same inputs: what has the shape of a
   batch of one only by chance would be spread over a larger one.
4. An activation behind a layer, a sum in it, or a norm, which nobody else reads, is computed there.
5. What computes in place on a tensor that others read stays as it is; no layer is moved past what changes its input.

What can be computed differently later is a `Recipe` in the graph that comes out.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn

from passes.freezing.recipe import FusedNorm, Recipe
from passes.layers.as_torch_made_it import is_as_torch_made_it
from passes.layers.channel_cut import works_on_filters
from passes.layers.grouped import GROUPED, Grouped
from passes.layers.norms import is_affine
from passes.tracing.mutation import is_held_elsewhere, is_unchanged
from passes.tracing.operations import activation_of, is_sum, module_of, passes_on
from passes.tracing.trace import Region

TRAINING_ARGUMENT = {"dropout": 2, "dropout1d": 2, "dropout2d": 2, "dropout3d": 2, "stochastic_depth": 3}


def fuse(region: Region, like: Tensor) -> fx.GraphModule:
    """Rewrite the eval graph of a region, which must have shapes, and return it; `like` has the dtype to compute in."""
    graph = region.graphs["eval"]
    for rule in (_drop_nothing, _make_recipes, _fold_norms, _fuse_sums, _make_norms, _fuse_activations):
        for node in list(graph.graph.nodes):
            rule(_Place(region, graph, node, like))
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Place:
    """A node in its graph, and what rules ask and do there."""

    def __init__(self, region: Region, graph: fx.GraphModule, node: fx.Node, like: Tensor) -> None:
        self.region, self.graph, self.node, self.like = region, graph, node, like

    def module(self, node: fx.Node) -> nn.Module | None:
        return module_of(self.graph, node)

    def recipe(self, node: object) -> Recipe | None:
        """The recipe whose result nobody but this node reads."""
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return None
        module = self.module(node)
        return module if isinstance(module, Recipe) else None

    def put(self, module: nn.Module, args: tuple[fx.node.Argument, ...]) -> fx.Node:
        """Put a call of `module` in the place of the node."""
        name = f"frozen.{self.node.name}"
        self.graph.add_submodule(name, module)
        with self.graph.graph.inserting_before(self.node):
            new = self.graph.graph.call_module(name, args)
        self.replace(new)
        return new

    def replace(self, other: fx.Node) -> None:
        """Let all who read the node read another, and take it out."""
        other.meta.update(self.node.meta)
        self.node.replace_all_uses_with(other)
        self.graph.graph.erase_node(self.node)


def _drop_nothing(place: _Place) -> None:
    node = place.node
    if passes_on(place.module(node)) or (node.op == "call_function" and _is_off(node)):
        place.node.replace_all_uses_with(node.all_input_nodes[0])
        place.graph.graph.erase_node(node)


def _is_off(node: fx.Node) -> bool:
    """Whether a function that only does something in training was called outside of it."""
    place = TRAINING_ARGUMENT.get(getattr(node.target, "__name__", ""))
    if place is None or len(node.all_input_nodes) != 1:
        return False
    return (node.args[place] if len(node.args) > place else node.kwargs.get("training")) is False


def _make_recipes(place: _Place) -> None:
    """Every call of a layer becomes a recipe of its own."""
    module = place.module(place.node)
    known = module is not None and type(module) in (*GROUPED, *GROUPED.values()) and is_as_torch_made_it(module)
    if module is not None and known and len(place.node.args) == 1 and not place.node.kwargs:
        place.put(Recipe(module, place.region.module_path(place.node)), place.node.args)


def _fold_norms(place: _Place) -> None:
    norm = place.module(place.node)
    recipe = place.recipe(place.node.args[0]) if place.node.args else None
    dims = len(_shape(place.node))
    if norm is not None and is_affine(norm) and recipe is not None and works_on_filters(norm, recipe.layer, dims):
        recipe.fold(norm)
        place.replace(place.node.all_input_nodes[0])


def _fuse_sums(place: _Place) -> None:
    node = place.node
    if not is_sum(node):
        return
    summands = [each for each in node.args if isinstance(each, fx.Node)]
    same = len(summands) == 2 and summands[0] is not summands[1] and _shape(summands[0]) == _shape(summands[1]) != ()
    if not same or _follows(summands[0]) != _follows(summands[1]):
        return
    if node.target in (operator.iadd, "add_") and is_held_elsewhere(summands[0], node):
        return
    order = list(place.graph.graph.nodes)
    fit = [each for each in summands if _takes_sum(place, each)]
    if not fit:
        return
    layer = max(fit, key=lambda each: (isinstance(_layer(place, each), Grouped), order.index(each)))
    other = summands[1 - summands.index(layer)]
    with place.graph.graph.inserting_before(node):
        new = place.graph.graph.call_module(str(layer.target), (layer.args[0], other))
    place.replace(new)
    place.graph.graph.erase_node(layer)


def _takes_sum(place: _Place, node: fx.Node) -> bool:
    recipe = place.recipe(node)
    free = recipe is not None and recipe.activation is None and len(node.args) == 1
    return free and is_unchanged(place.graph, node.all_input_nodes[0], node, place.node)


def _follows(node: fx.Node) -> set[fx.Node]:
    """The inputs of the graph that a node depends on."""
    found, todo = set(), [node]
    for each in todo:  # grows as it goes
        if each not in found:
            found.add(each)
            todo += each.all_input_nodes
    return {each for each in found if each.op == "placeholder"}


def _layer(place: _Place, node: fx.Node) -> nn.Module | None:
    recipe = place.recipe(node)
    return None if recipe is None else recipe.layer


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _make_norms(place: _Place) -> None:
    norm = place.module(place.node)
    if norm is not None and is_affine(norm):
        place.put(FusedNorm(norm, place.like), place.node.args)


def _fuse_activations(place: _Place) -> None:
    node = place.node
    name = activation_of(place.graph, node)
    before = node.args[0] if node.args else None
    if name is None or not isinstance(before, fx.Node) or len(before.users) != 1:
        return
    module = place.module(before)
    if isinstance(module, Recipe | FusedNorm) and module.activation is None:
        module.activation = name
        place.replace(before)
