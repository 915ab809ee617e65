"""Choosing: every layer is run in the way that is fastest on its real shape.

1. The candidates of a layer are the library, the library with channels last, and the kernel with a few tilings; of a
   regrouped layer also the kernel with the dense weight, with zeros where it is pruned.
2. They are raced (see `stopwatch`) on random inputs of the shapes that the example inputs lead to. They are named in
   the order of simplicity: of those that are as fast, the first one is taken.
3. Decisions that are given are taken as they are; layers that they don't name are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.errors import InputError
from passes.freezing.decisions import LayerDecision
from passes.freezing.recipe import LastPool, LibraryLayer, Recipe, call_name
from passes.freezing.stopwatch import Stopwatch, fastest
from passes.layers.as_torch_made_it import is_as_torch_made_it
from passes.layers.geometry import is_linear, output_sizes, spatial_dims
from passes.layers.grouped import Grouped
from passes.layers.plain import dense_layer
from passes.layers.plan import attach_plan, plan_of
from passes.tracing.shapes import Interpreter

STRATEGIES = ("library", "kernel")
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def choose(
    graph: fx.GraphModule,
    inputs: tuple[Any, ...],
    strategy: str | None,
    given: Mapping[str, LayerDecision],
    stopwatch: Stopwatch,
    step: Callable[[], object] = lambda: None,
) -> dict[str, LayerDecision]:
    """Put the fastest form of each layer in the place of its recipe, in place.

    Args:
        graph: a fused eval graph.
        inputs: example inputs of the graph.
        strategy: None to measure; ``"library"`` or ``"kernel"`` forces one, the kernel where it can compute a layer.
        given: decisions to take as they are, by layer.
        stopwatch: measures what is not given.
        step: called after each layer.

    Returns:
        What was decided, by layer.
    """
    choosing = _Choosing(graph, strategy, given, stopwatch, step)
    with torch.no_grad():
        choosing.run(*inputs)
    return choosing.decided


def _is_pool(module: nn.Module) -> bool:
    """Whether a module is a pooling that gives one tensor."""
    known = type(module) in POOLS and is_as_torch_made_it(module)
    return known and not getattr(module, "return_indices", False)


def layer_works(graph: fx.GraphModule) -> dict[str, LayerDecision]:
    """What each layer that `choose` would decide about has to do, for the shapes of the graph; left to the library."""
    works: dict[str, LayerDecision] = {}
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Recipe):
            x = node.all_input_nodes[0].meta["val"]
            works[call_name(module.path, works)] = _work(x, _macs(module, x.shape))
        elif module is not None and _is_pool(module):
            works[call_name(str(node.target), works)] = _work(node.all_input_nodes[0].meta["val"])
    return works


def _work(x: Tensor, macs: int = 0) -> LayerDecision:
    """The decision to leave to the library what reads `x`."""
    numbers = f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return LayerDecision("library", macs=macs, shape=tuple(x.shape), numbers=numbers)


def chosen_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that `choose` put into a model, or into graphs in it, by their paths there.

    Each has the ``path`` that its decision is known by, and ``kept_weights``: how many are not pruned.
    """
    return {path: module for path, module in model.named_modules() if hasattr(module, "kept_weights")}


def filters_of(chosen: Any) -> int:
    """How many filters a chosen layer has."""
    return len(chosen.weight if isinstance(chosen, LibraryLayer) else chosen.filters)


def chosen_macs(chosen: Any, output: Tensor) -> int:
    """Multiply-adds of a call of a chosen layer that gave `output`: its kept weights at each of the positions."""
    placed = not isinstance(chosen, LibraryLayer) and output.dim() == 4
    picture = chosen.form.placement.writes.strip(output) if placed else output
    return int(chosen.kept_weights) * (picture.numel() // filters_of(chosen))


def _choose_pool(
    pool: nn.Module, inputs: tuple[Tensor, ...], given: LayerDecision | None, stopwatch: Stopwatch
) -> tuple[nn.Module, LayerDecision]:
    work = _work(inputs[0])
    candidates: dict[str, Callable[[], nn.Module]] = {"library": partial(_itself, pool)}
    if inputs[0].dim() == 4:
        candidates["channels_last"] = partial(LastPool, pool)
    if given is not None and given.way in candidates:
        return candidates[given.way](), _as_told(given.way, given, work)
    times = _measured(candidates, inputs, stopwatch)
    return candidates[best := fastest(times)](), LayerDecision.of(best, times, work)


def _itself(module: nn.Module) -> nn.Module:
    return module


class Running(Interpreter):
    """Runs a fused graph, its recipes by the library."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, or what the library makes of a recipe."""
        module = self.fetch_attr(target)
        return LibraryLayer(module)(*args) if isinstance(module, Recipe) else module(*args, **kwargs)


class _Choosing(Running):
    """Runs a graph and chooses each layer when its input is there: no more of them is held than running takes."""

    def __init__(
        self,
        graph: fx.GraphModule,
        strategy: str | None,
        given: Mapping[str, LayerDecision],
        stopwatch: Stopwatch,
        step: Callable[[], object],
    ) -> None:
        super().__init__(graph)
        self.decided: dict[str, LayerDecision] = {}
        self._strategy, self._given, self._stopwatch, self._step = strategy, given, stopwatch, step

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose how the module is run if that is to be decided, put that in its place, and call it."""
        module, inputs = self.fetch_attr(target), tuple(x for x in args if isinstance(x, Tensor))
        if isinstance(module, Recipe):
            name = call_name(module.path, self.decided)
            given = self._given.get(name)
            chosen, self.decided[name] = _choose_one(module, inputs, self._strategy, given, self._stopwatch)
            chosen.path, chosen.kept_weights = name, _weights(module)
            if (plan := plan_of(module.layer)) is not None:
                attach_plan(chosen, plan)
            self.module.set_submodule(target, chosen)
            self._step()
        elif _is_pool(module) and self._strategy != "library":
            name = call_name(target, self.decided)
            chosen, self.decided[name] = _choose_pool(module, inputs, self._given.get(name), self._stopwatch)
            self.module.set_submodule(target, chosen)
            self._step()
        return super().call_module(target, args, kwargs)


def _choose_one(
    recipe: Recipe,
    inputs: tuple[Tensor, ...],
    strategy: str | None,
    given: LayerDecision | None,
    stopwatch: Stopwatch,
) -> tuple[Any, LayerDecision]:
    work = _work(inputs[0], _macs(recipe, inputs[0].shape))
    if strategy == "library" and given is None:
        return LibraryLayer(recipe), work
    candidates = _candidates(recipe, inputs)
    if given is not None:
        return _as_given(candidates, given, work)
    kernels = [name for name in candidates if name.startswith("kernel")]
    if (not kernels and strategy == "kernel") or len(candidates) == 1:
        return candidates["library"](), work
    if strategy == "kernel":
        candidates = {name: candidates[name] for name in kernels}
    times = _measured(candidates, inputs, stopwatch)
    return candidates[best := fastest(times)](), LayerDecision.of(best, times, work)


def _as_given(
    candidates: Mapping[str, Callable[[], nn.Module]], given: LayerDecision, work: LayerDecision
) -> tuple[Any, LayerDecision]:
    """The form that a decision names, with its tiling even if that would not be tried here; else the library's."""
    name = next((name for name in candidates if name.split()[0] == given.way), None)
    if name is None:
        return candidates["library"](), work
    chosen: Any = candidates[name]()
    if given.tiling:
        from passes.kernel import Tiling

        chosen.form = replace(chosen.form, tiling=Tiling(*given.tiling))
    return chosen, _as_told(given.name, given, work)


def _as_told(name: str, given: LayerDecision, work: LayerDecision) -> LayerDecision:
    """What was given, of the work that there is; times of other work are none of it."""
    return LayerDecision.of(name, given.milliseconds if given.is_alike(work) else {}, work)


def _candidates(recipe: Recipe, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Each candidate's name, and how to make it."""
    found: dict[str, Callable[[], nn.Module]] = {"library": lambda: LibraryLayer(recipe)}
    x, linear = inputs[0], is_linear(recipe.layer)
    if x.dim() == 4 and not linear and x.device.type == "cpu":
        found["channels_last"] = lambda: LibraryLayer(recipe, channels_last=True)
    if kernel_obstacle(recipe, inputs[0]) is None:
        shape = (x.shape[:-1].numel(), x.shape[-1], 1, 1) if linear else x.shape
        found.update(_kernels("kernel", recipe, recipe.layer, shape))
        if isinstance(recipe.layer, Grouped):
            found.update([next(_kernels("dense", recipe, dense_layer(recipe.layer), shape))])
    return found


def _kernels(
    way: str, recipe: Recipe, layer: nn.Module, shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """A layer with what the recipe has fused into it, packed for the kernel, with each tiling that is worth timing."""
    from passes.freezing.packing import pack_layer
    from passes.kernel import PackedConv2d, Tiling, tilings
    from passes.kernel.layout.packing import Tables

    scale, shift = (None if x is None else x.float() for x in (recipe.scale, recipe.shift))
    first = pack_layer(layer, scale=scale, shift=shift, ends=recipe.ends, activation=recipe.activation)

    def packed(tiling: Tiling) -> PackedConv2d:
        return type(first)(Tables(**dict(first.named_buffers())), replace(first.form, tiling=tiling))

    for tiling in tilings(first, shape):
        yield f"{way} {tiling.strip} {tiling.tasks}", partial(packed, tiling)


def kernel_obstacle(recipe: Recipe, x: Tensor) -> str | None:
    """Why the kernel can't compute a layer, or None if it can."""
    layer: Any = recipe.layer
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return "the kernel computes fp32 on the CPU"
    if not is_linear(layer) and (spatial_dims(layer) != 2 or layer.padding_mode != "zeros" or x.dim() != 4):
        return "the kernel computes two-dimensional convolutions that pad with zeros, on batches"
    if x.numel() == 0:
        return "the example is empty"
    from passes.kernel import supported

    return supported()


def _measured(
    candidates: Mapping[str, Callable[[], Any]], inputs: tuple[Tensor, ...], stopwatch: Stopwatch
) -> dict[str, float]:
    """Milliseconds of each candidate."""
    with torch.no_grad():
        return stopwatch.race({name: partial(make(), *inputs) for name, make in candidates.items()})


def _macs(recipe: Recipe, shape: torch.Size) -> int:
    """Multiply-adds of a layer for an input of `shape`: its connections times its outputs' positions."""
    layer: Any = recipe.layer
    weights = _weights(recipe)
    if is_linear(layer):
        return weights * shape[:-1].numel()
    spatial = spatial_dims(layer)
    examples = shape[: -spatial - 1].numel()  # 1 where there is no batch
    return weights * examples * math.prod(output_sizes(layer, shape[-spatial:]))


def _weights(recipe: Recipe) -> int:
    layer: Any = recipe.layer
    return int(layer.weight.numel())


def checked_strategy(strategy: object) -> str | None:
    """Check the strategy that a user forces."""
    if strategy is not None and strategy not in STRATEGIES:
        raise InputError(f"strategy must be {' or '.join(map(repr, STRATEGIES))} or None, not {strategy!r}")
    return None if strategy is None else str(strategy)
