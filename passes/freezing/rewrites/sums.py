"""Sums: a layer computes the sum behind it, starting from the other summand instead of from zero.

1. Nobody else reads the layer. A regrouped layer is preferred, else the later one.
2. Both summands follow the same inputs: what has the shape of a batch of one only by chance would be spread over a
   larger one.
3. A sum that is computed in place on a tensor that others read stays; no layer is moved past what changes its input.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from passes.freezing.choosing.recipe import Recipe
from passes.freezing.rewrites.norms import done_behind
from passes.freezing.rewrites.rewrite import Place, Rule, other_readers, recipe_of, shape_of
from passes.layers.grouped import Grouped
from passes.tracing.mutation import is_held_elsewhere, is_unchanged
from passes.tracing.operations import is_sum

IN_PLACE = (operator.iadd, "add_")


class FuseSums(Rule):
    """Let layers add what is added to them."""

    name = "fuse sums"

    def applies(self, place: Place) -> bool:
        """A sum of tensors that have dimensions."""
        return is_sum(place.node) and shape_of(place.node) != ()

    def obstacle(self, place: Place) -> str | None:
        """What is added, and why neither summand can be what a layer starts from."""
        summands = _summands(place)
        return _unlike(place, summands) or _none_fits(place, summands)

    def rewrite(self, place: Place) -> None:
        """Let the layer read the other summand."""
        nodes = list(place.graph.graph.nodes)
        fit = [each for each in _summands(place) if _layer_obstacle(place, each) is None]
        layer = max(fit, key=lambda each: (_is_grouped(place, each), nodes.index(each)))
        other = next(each for each in _summands(place) if each is not layer)
        with place.graph.graph.inserting_before(place.node):
            new = place.graph.graph.call_module(str(layer.target), (layer.args[0], other))
        place.replace(new)
        place.graph.graph.erase_node(layer)


def _summands(place: Place) -> list[fx.Node]:
    return [each for each in place.node.args if isinstance(each, fx.Node)]


def _unlike(place: Place, summands: list[fx.Node]) -> str | None:
    """Why a sum is not one of two tensors alike, which may be added in any order."""
    if len(summands) != 2 or any(not isinstance(each.meta.get("val"), Tensor) for each in summands):
        return "it adds a number, and no tensor"
    first, second = summands
    if first is second:
        return "it adds a tensor to itself"
    if shape_of(first) != shape_of(second):
        return f"its summands have the shapes {list(shape_of(first))} and {list(shape_of(second))}"
    if inputs_behind(first) != inputs_behind(second):
        return "its summands follow different inputs of the model, which may differ in their batch"
    if place.node.target in IN_PLACE and is_held_elsewhere(first, place.node):
        return "it changes a tensor in place that is read elsewhere"
    return None


def _none_fits(place: Place, summands: list[fx.Node]) -> str | None:
    """Why neither summand is a layer that can add the other; None if one is."""
    reasons = {each: _layer_obstacle(place, each) for each in summands}
    if None in reasons.values():
        return None
    layers = [str(reason) for each, reason in reasons.items() if recipe_of(place.graph, each) is not None]
    return ", and ".join(layers) or "neither summand is the output of a layer"


def _layer_obstacle(place: Place, summand: fx.Node) -> str | None:
    """Why a summand can't be a layer that adds the other one."""
    recipe = recipe_of(place.graph, summand)
    if recipe is None:
        return "it is no layer"
    if not is_unchanged(place.graph, summand.all_input_nodes[0], summand, place.node):
        return f"what layer {recipe.path!r} reads is changed in place before the sum"
    return done_behind(summand, recipe) or other_readers(summand, f"the output of layer {recipe.path!r}")


def inputs_behind(node: fx.Node) -> set[fx.Node]:
    """The inputs of the graph that a node depends on."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        each = todo.pop()
        if each not in found:
            found.add(each)
            todo += each.all_input_nodes
    return {each for each in found if each.op == "placeholder"}


def _is_grouped(place: Place, summand: fx.Node) -> bool:
    recipe = recipe_of(place.graph, summand)
    return isinstance(recipe, Recipe) and isinstance(recipe.layer, Grouped)
