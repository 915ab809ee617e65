"""Choosing: every layer of a graph is put in the form that is fastest on its real shape (see `candidates`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.freezing.choosing.candidates import choose_layer, choose_pool, kept_weights, layer_macs, work_of
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.choosing.recipe import LibraryLayer, Recipe, call_name
from passes.freezing.choosing.stopwatch import Stopwatch
from passes.freezing.pooling import is_pool
from passes.freezing.rewrites.rewrite import PLAIN_INPUTS, SHAPES, UNFUSED, graph_of
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.kernel import PackedConv2d
from passes.layers.plan import attach_plan, plan_of
from passes.tracing.interpreter import Interpreter
from passes.tracing.operations import module_of

LAYERS = Fact[Mapping[str, LayerDecision]]("layers")  # how each layer is run, by its path


class Choosing(Pass):
    """Put the fastest form of each layer in the place of its recipe.

    Args:
        strategy: None to measure; ``"library"`` or ``"kernel"`` forces one, the kernel where it can compute a layer.
        given: decisions to take as they are, by layer.
        stopwatch: measures what is not given.
        tick: called after each layer.
    """

    name = "choosing"
    requires = (SHAPES,)
    ensures = (LAYERS,)
    ends = (UNFUSED, PLAIN_INPUTS)  # which speak of recipes

    def __init__(
        self,
        strategy: str | None,
        given: Mapping[str, LayerDecision],
        stopwatch: Stopwatch,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        """Take what decides."""
        self._strategy, self._given, self._stopwatch, self._tick = strategy, given, stopwatch, tick

    def run(self, compilation: Compilation) -> Facts:
        """Run the graph, and choose each layer when its input is there."""
        choosing = _Choosing(graph_of(compilation), self._decide)
        with torch.no_grad():
            choosing.run(*compilation[SHAPES])
        return {LAYERS: choosing.decided}

    def check(self, compilation: Compilation) -> str | None:
        """No recipe is left, which nobody can run."""
        recipes = (module for module in compilation.model.modules() if isinstance(module, Recipe))
        return next((f"nothing was chosen for layer {recipe.path!r}" for recipe in recipes), None)

    def _decide(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, LayerDecision] | None:
        """The form of a module, and what was decided, under the name it has; None if it stays as it is."""
        given, found = self._given.get(name), None
        if isinstance(module, Recipe):
            found = choose_layer(module, inputs, self._strategy, given, self._stopwatch)
            chosen, _ = found
            chosen.path, chosen.kept_weights = name, kept_weights(module)
            if (plan := plan_of(module.layer)) is not None:
                attach_plan(chosen, plan)
        elif is_pool(module) and self._strategy != "library":
            found = choose_pool(module, inputs, self._strategy, given, self._stopwatch)
        if found is not None:
            self._tick()
        return found


class Running(Interpreter):
    """Runs a rewritten graph, its recipes by the library."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, or what the library makes of a recipe."""
        module = self.fetch_attr(target)
        return LibraryLayer(module)(*args) if isinstance(module, Recipe) else module(*args, **kwargs)


class _Choosing(Running):
    """Runs a graph and chooses each layer when its input is there: no more of them is held than running takes."""

    def __init__(self, graph: fx.GraphModule, decide: Callable[..., tuple[Any, LayerDecision] | None]) -> None:
        super().__init__(graph)
        self.decided: dict[str, LayerDecision] = {}
        self._decide = decide

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose how the module is run if that is to be decided, put that in its place, and call it."""
        module, inputs = self.fetch_attr(target), tuple(x for x in args if isinstance(x, Tensor))
        name = call_name(module.path if isinstance(module, Recipe) else target, self.decided)
        found = self._decide(name, module, inputs)
        if found is not None:
            chosen, self.decided[name] = found
            self.module.set_submodule(target, chosen)
        return super().call_module(target, args, kwargs)


def layer_works(graph: fx.GraphModule) -> dict[str, LayerDecision]:
    """What each layer that is to be decided about has to do, for the shapes of the graph; left to the library."""
    works: dict[str, LayerDecision] = {}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if isinstance(module, Recipe):
            x = node.all_input_nodes[0].meta["val"]
            works[call_name(module.path, works)] = work_of(x, layer_macs(module, x.shape))
        elif module is not None and is_pool(module):
            works[call_name(str(node.target), works)] = work_of(node.all_input_nodes[0].meta["val"])
    return works


def chosen_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that were chosen for a model, or for graphs in it, by their paths there.

    Each has the ``path`` that its decision is known by, and ``kept_weights``: how many are not pruned.
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, LibraryLayer | PackedConv2d)}


def filters_of(chosen: Any) -> int:
    """How many filters a chosen layer has."""
    return len(chosen.weight if isinstance(chosen, LibraryLayer) else chosen.filters)


def chosen_macs(chosen: Any, output: Tensor) -> int:
    """Multiply-adds of a call of a chosen layer that gave `output`: its kept weights at each of the positions."""
    placed = not isinstance(chosen, LibraryLayer) and output.dim() == 4
    picture = chosen.form.placement.writes.strip(output) if placed else output
    return int(chosen.kept_weights) * (picture.numel() // filters_of(chosen))
