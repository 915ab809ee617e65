"""Norms: one in eval mode multiplies and shifts each channel, which a layer before it can do with its own weights.

``scale · (W x + b) + shift = (scale · W) x + (scale · b + shift)``, where nobody else reads the layer. What is left is
a `FusedNorm`, into which at least an activation can go.
"""

from __future__ import annotations

from torch import fx

from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.rewrite import SHAPES, Place, Rewrite, Rule, graph_of, other_readers, recipe_of, shape_of
from passes.infra.compilation import Compilation
from passes.layers.channel_cut import works_on_filters
from passes.layers.known.norms import is_affine
from passes.tracing.operations import module_of


class FoldNorms(Rule):
    """Fold norms into the layers before them."""

    name = "fold norms"

    def applies(self, place: Place) -> bool:
        """A norm with running statistics."""
        return is_affine(place.module)

    def obstacle(self, place: Place) -> str | None:
        """What stands before it, or who else reads that."""
        before = place.node.all_input_nodes[0]
        recipe = recipe_of(place.graph, before)
        if recipe is None:
            return "no layer stands before it"
        norm = place.graph.get_submodule(str(place.node.target))
        if not works_on_filters(norm, recipe.layer, len(shape_of(place.node))):
            return f"it works on another dimension than the filters of layer {recipe.path!r}"
        return done_behind(before, recipe) or other_readers(before, f"the output of layer {recipe.path!r}")

    def rewrite(self, place: Place) -> None:
        """Fold it."""
        before = place.node.all_input_nodes[0]
        recipe = recipe_of(place.graph, before)
        if recipe is not None:
            recipe.fold(place.graph.get_submodule(str(place.node.target)))
            place.replace(before)


class KeepNorms(Rewrite):
    """Put a `FusedNorm` in the place of norms that are left."""

    name = "keep norms"
    requires = (SHAPES,)

    def run(self, compilation: Compilation) -> None:
        """Go through the graph."""
        graph = graph_of(compilation)
        for node in list(graph.graph.nodes):
            norm = module_of(graph, node)
            if norm is not None and is_affine(norm):
                Place(graph, node, "").put(FusedNorm(norm, node.meta["val"].dtype))
        graph.delete_all_unused_submodules()
        graph.recompile()


def done_behind(node: fx.Node, recipe: Recipe) -> str | None:
    """What is fused into a layer already, behind which no more can be; None if nothing is."""
    if recipe.activation is not None:
        return f"layer {recipe.path!r} has an activation already"
    return f"layer {recipe.path!r} adds another tensor already" if len(node.args) > 1 else None
