"""Activations: one behind a layer, a sum in it, or a norm is computed there, where nobody else reads what it reads."""

from __future__ import annotations

from torch import fx

from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.rewrite import Place, Rule, other_readers
from passes.tracing.operations import activation_of, module_of


class FuseActivations(Rule):
    """Let layers and norms compute the activations behind them."""

    name = "fuse activations"

    def applies(self, place: Place) -> bool:
        """An activation that the kernel and the library know."""
        return activation_of(place.graph, place.node) is not None

    def obstacle(self, place: Place) -> str | None:
        """What stands before it, or who else reads that."""
        before = place.node.args[0] if place.node.args else None
        module = module_of(place.graph, before) if isinstance(before, fx.Node) else None
        if not isinstance(before, fx.Node) or not isinstance(module, Recipe | FusedNorm):
            return "neither a layer nor a norm stands before it"
        name = f"layer {module.path!r}" if isinstance(module, Recipe) else "the norm before it"
        if module.activation is not None:
            return f"{name} has another activation already"
        return other_readers(before, f"the output of {name}")

    def rewrite(self, place: Place) -> None:
        """Leave it to what stands before."""
        before = place.node.all_input_nodes[0]
        module = module_of(place.graph, before)
        if isinstance(module, Recipe | FusedNorm):
            module.activation = activation_of(place.graph, place.node)
            place.replace(before)
