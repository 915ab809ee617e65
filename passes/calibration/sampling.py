"""Calibration: the kept weights of a compressed model, re-solved layer by layer in closed form on unlabelled data.

Both graphs are walked in step (`paired_walk.py`). At each regrouped layer, in order of execution:

1. X is what the layer reads in the *compressed* network, so that it makes up for what the layers before it have lost.
2. It is aimed at what the dense network has at the end of the layer's `surroundings`: behind the norm, and,
   where another branch is added to it, at the dense *sum*, so that it also makes up for what that branch lacks,
   wherever that is known already.
3. Where a ReLU follows, what it clips does not count (`layer_solver.py`).
4. A layer without a bias gets one in the running mean of the norm behind it. No other statistic is touched: the output
   of a least-squares fit has less variance than its target, and a norm that restored it would only amplify the error.
5. Behind a choice by value (`value_choices.py`) rows of the two networks may not belong together: there, both sides of
   the least squares are the dense network's.

Rows are sampled positions of the layer's output, at most `MAX_ROWS` and `ROW_BYTES`, whatever the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.calibration.followers import Surroundings, surroundings
from passes.calibration.layer_solver import Sample, resolve
from passes.calibration.paired_walk import Pair, Walk
from passes.calibration.rows import input_rows, output_positions, output_rows
from passes.errors import InputError
from passes.layers.channel_cut import works_on_filters
from passes.layers.norms import scale_and_shift
from passes.tracing.operations import module_of

MAX_ROWS = 1 << 15
ROW_BYTES = 3 << 27  # of a layer's inputs, wanted outputs and offsets together, as float64


def calibrate_region(
    dense: fx.GraphModule,
    small: fx.GraphModule,
    batches: Sequence[Pair],
    path: str = "",
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Re-solve all regrouped layers of one traced part, in place in `small`.

    Args:
        dense: the eval graph of the dense model.
        small: the eval graph of the compressed one.
        batches: the arguments of every batch, for the dense and for the compressed graph.
        path: of the part in the model, for messages.
        tick: called after each layer.

    Returns:
        What has changed: new values of parameters and buffers, by their names in `small`. A layer that reads nothing,
        as where a detector finds nothing, keeps its own.

    Raises:
        InputError: the graphs differ, the batches do not fit, or a layer yields NaN, infinite or far too large values.
    """
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        walk = Walk(dense, small, batches, path)
        for stop in walk.stops():
            changed |= _solved(walk, stop)
            tick()
    return changed


def _solved(walk: Walk, stop: fx.Node) -> dict[str, Tensor]:
    """Re-solve the layer at `stop`, in place."""
    layer: Any = walk.module(stop)
    around = surroundings_at(walk, stop)
    norm: Any = None if around.norm is None else walk.module(around.norm)
    sample = sample_at(walk, stop, around)
    if not len(sample.wanted):
        return {}
    folded = norm is not None and layer.bias is None
    weight, bias = resolve(layer, sample, intercept=folded or layer.bias is not None)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise overflow(walk.name(stop))
    changed = _written(layer, "weight", f"{stop.target}.weight", weight)
    if layer.bias is not None:
        changed |= _written(layer, "bias", f"{stop.target}.bias", bias)
    elif around.norm is not None:
        mean = norm.running_mean - bias.to(norm.running_mean.dtype)
        changed |= _written(norm, "running_mean", f"{around.norm.target}.running_mean", mean)
    return changed


def _written(module: nn.Module, name: str, path: str, value: Tensor) -> dict[str, Tensor]:
    tensor = getattr(module, name)
    tensor.copy_(value)
    return {path: tensor}


def surroundings_at(walk: Walk, stop: fx.Node) -> Surroundings:
    """What follows a layer; less is made of it where not everything is known, or the layer has several calls."""
    found = surroundings(walk.graphs[0], stop)
    calls = [node for node in walk.nodes if node.target == stop.target]
    if len(calls) > 1:
        each = [surroundings(walk.graphs[0], call) for call in calls]
        return Surroundings(None, None, all(around == Surroundings(None, None, True) for around in each))
    norm, other = found.norm, found.other
    if norm is None and other is None:
        return found
    held = next(walk.at(stop))
    y = held.value(0, stop, stop)
    if norm is not None:
        shared = sum(node.target == norm.target for node in walk.nodes) > 1
        after: Any = walk.module(norm)
        layer: Any = walk.module(stop)
        if shared or not works_on_filters(after, layer, y.dim()):
            return Surroundings(None, None, False)
    if other is not None and (walk.route(stop, [other]) is None or not _fits(held.value(0, other, stop), y)):
        return Surroundings(norm, None, False)
    return found


def sample_at(walk: Walk, stop: fx.Node, around: Surroundings) -> Sample:
    """Bring all batches before `stop`, and collect what its layer reads there and should yield.

    Raises:
        InputError: sums of squares of these numbers are NaN or infinite.
    """
    layer: Any = walk.module(stop)
    inputs, wanted, offsets = [], [], []
    generator = torch.Generator().manual_seed(0)
    calls = walk.calls_with(stop)
    share = len(walk.batches) * len(calls)
    (scale, shift), (own_scale, own_shift) = (_affine(graph, around.norm, layer) for graph in walk.graphs)
    for held in walk.at(stop):
        own = 0 if held.chosen else 1
        for call in calls:
            y = held.value(0, call, stop)
            positions = _positions(layer, y, share, generator)
            inputs.append(input_rows(layer, held.value(own, call.all_input_nodes[0], stop), positions))
            goal = output_rows(layer, y, positions).double() * scale + shift
            offset = own_shift.expand_as(goal)
            if around.other is not None:
                theirs, ours = (held.value(side, around.other, stop).expand_as(y) for side in (0, own))
                goal = goal + output_rows(layer, theirs, positions)
                offset = offset + output_rows(layer, ours, positions)
            wanted.append(goal)
            offsets.append(offset)
    sample = Sample(torch.cat(inputs), torch.cat(wanted), torch.cat(offsets), own_scale, around.clipped)
    for numbers in (sample.inputs, sample.wanted, sample.offset):  # then so are those of their products, and of parts
        if not torch.isfinite(torch.linalg.vector_norm(numbers, dtype=torch.float64)):
            raise overflow(walk.name(stop))
    return sample


def overflow(name: str) -> InputError:
    """What is said of a layer whose numbers can't be computed with."""
    return InputError(
        f"layer {name!r} reads or yields NaN or infinite values on the data, or ones too large to be squared: look for "
        "examples that are not normalised as in training, and at the weights of this layer and of those before it"
    )


def _fits(other: object, y: Tensor) -> bool:
    """Whether adding `other` leaves the shape of `y` as it is."""
    if not isinstance(other, Tensor) or other.dim() > y.dim():
        return False
    behind = y.shape[y.dim() - other.dim() :]
    return all(size in (1, wanted) for size, wanted in zip(other.shape, behind, strict=True))


def _affine(graph: fx.GraphModule, norm: fx.Node | None, layer: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift behind a layer in one of the graphs: of the norm there, or 1 and 0."""
    if norm is not None:
        return scale_and_shift(module_of(graph, norm))
    ones = torch.ones(layer.dense_shape[0], dtype=torch.float64, device=layer.weight.device)
    return ones, torch.zeros_like(ones)


def _positions(layer: Any, y: Tensor, share: int, generator: torch.Generator) -> Tensor:
    """Which positions of one batch's output are sampled: at most one of `share` parts of all rows that are allowed."""
    shape = layer.dense_shape
    row = 8 * (math.prod(shape[1:]) + 2 * shape[0])
    count = output_positions(layer, y)
    most = max(1, min(MAX_ROWS, ROW_BYTES // row) // share)
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most]
