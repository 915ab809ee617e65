"""Candidates: the ways to run a layer, of which the fastest on its real shape is taken.

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
from torch import Tensor, nn

from passes import kernel
from passes.freezing.choosing import packing
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.choosing.recipe import LastPool, LibraryLayer, Recipe
from passes.freezing.choosing.stopwatch import Stopwatch, fastest
from passes.freezing.pooling import pool_step
from passes.kernel import PackedConv2d, Tiling, tilings
from passes.kernel.layout.packing import Tables
from passes.layers.grouped import Grouped
from passes.layers.known.geometry import is_linear, output_sizes, spatial_dims
from passes.layers.plain import dense_layer


def work_of(x: Tensor, macs: int = 0) -> LayerDecision:
    """The decision to leave to the library what reads `x`."""
    numbers = f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return LayerDecision("library", macs=macs, shape=tuple(x.shape), numbers=numbers)


def choose_pool(
    pool: nn.Module,
    inputs: tuple[Tensor, ...],
    strategy: str | None,
    given: LayerDecision | None,
    stopwatch: Stopwatch,
) -> tuple[nn.Module, LayerDecision]:
    """The form of a pooling for these inputs, and what was decided: as given, or else by a race."""
    work = work_of(inputs[0])
    candidates: dict[str, Callable[[], nn.Module]] = {"library": partial(_itself, pool)}
    if inputs[0].dim() == 4:
        candidates["channels_last"] = partial(LastPool, pool)
        step = pool_step(pool, inputs[0].shape[1]) if work.numbers == "float32 on cpu" else None
        if step is not None:
            candidates["kernel"] = partial(_itself, step)
    if given is not None and given.way in candidates:
        return candidates[given.way](), _as_told(given.way, given, work)
    if strategy == "kernel" and "kernel" in candidates:
        candidates = {"kernel": candidates["kernel"]}
    times = _measured(candidates, inputs, stopwatch)
    return candidates[best := fastest(times)](), LayerDecision.of(best, times, work)


def _itself(module: nn.Module) -> nn.Module:
    return module


def choose_layer(
    recipe: Recipe,
    inputs: tuple[Tensor, ...],
    strategy: str | None,
    given: LayerDecision | None,
    stopwatch: Stopwatch,
) -> tuple[Any, LayerDecision]:
    """The form of a layer for these inputs, and what was decided: as given, or else by a race.

    Args:
        recipe: the layer and what is fused into it.
        inputs: what it reads, and what it adds.
        strategy: forces the library, or the kernel where it can compute the layer; None to measure.
        given: the decision to take as it is, or None.
        stopwatch: measures what is not given.
    """
    work = work_of(inputs[0], layer_macs(recipe, inputs[0].shape))
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
    scale, shift = (None if x is None else x.float() for x in (recipe.scale, recipe.shift))
    first = packing.pack_layer(layer, scale=scale, shift=shift, ends=recipe.ends, activation=recipe.activation)

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
    return kernel.supported()


def _measured(
    candidates: Mapping[str, Callable[[], Any]], inputs: tuple[Tensor, ...], stopwatch: Stopwatch
) -> dict[str, float]:
    """Milliseconds of each candidate."""
    with torch.no_grad():
        return stopwatch.race({name: partial(make(), *inputs) for name, make in candidates.items()})


def layer_macs(recipe: Recipe, shape: torch.Size) -> int:
    """Multiply-adds of a layer for an input of `shape`: its connections times its outputs' positions."""
    layer: Any = recipe.layer
    weights = kept_weights(recipe)
    if is_linear(layer):
        return weights * shape[:-1].numel()
    spatial = spatial_dims(layer)
    examples = shape[: -spatial - 1].numel()  # 1 where there is no batch
    return weights * examples * math.prod(output_sizes(layer, shape[-spatial:]))


def kept_weights(recipe: Recipe) -> int:
    """How many weights of a layer are not pruned."""
    layer: Any = recipe.layer
    return int(layer.weight.numel())
