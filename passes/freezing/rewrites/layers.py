"""Layers: every call of a layer becomes a `Recipe` of its own, into which what follows can be fused.

A layer is known by its class, so nothing may have been changed about it; what is not known is run as it is.
"""

from __future__ import annotations

from passes.freezing.choosing.recipe import Recipe
from passes.freezing.rewrites.rewrite import PART, PLAIN_INPUTS, SHAPES, UNFUSED, Place, Rule
from passes.infra.compilation import Compilation, Facts
from passes.layers.grouped import GROUPED
from passes.layers.known.as_torch_made_it import change_of
from passes.layers.known.geometry import is_layer

KINDS = (*GROUPED, *GROUPED.values())


class MakeRecipes(Rule):
    """Put recipes in the place of convolutions and linear layers."""

    name = "make recipes"
    requires = (PART, SHAPES)
    ensures = (UNFUSED, PLAIN_INPUTS)

    def run(self, compilation: Compilation) -> Facts:
        """Go through the graph; nothing is known yet of what could not be fused."""
        return {UNFUSED: self.walk(compilation, {}), PLAIN_INPUTS: True}

    def applies(self, place: Place) -> bool:
        """A call of a convolution or a linear layer."""
        return is_layer(place.module)

    def obstacle(self, place: Place) -> str | None:
        """Its class, what was changed about it, or how it is called."""
        layer = place.graph.get_submodule(str(place.node.target))
        if type(layer) not in KINDS:
            return f"it is a {type(layer).__name__}, which is run as it is"
        if len(place.node.args) != 1 or place.node.kwargs:
            return "it is called with more than its input"
        return change_of(layer)

    def rewrite(self, place: Place) -> None:
        """Put a recipe there."""
        place.put(Recipe(place.graph.get_submodule(str(place.node.target)), place.path))
