"""Sampling: what a layer reads and should yield, at some positions of its output, while a walk stands before it.

1. Its inputs are those in the *compressed* network, so that it makes up for what the layers before it have lost.
2. It is aimed at what the dense network has at the end of what follows it (`followers.py`): behind the norm, and, where
   another branch is added to it, at the dense *sum*, so that it also makes up for what that branch lacks, wherever that
   is known already.
3. Behind a choice by value (`value_choices.py`) rows of the two networks may not belong together: there, both sides of
   the least squares are the dense network's.

Rows are sampled positions of the layer's output, at most `MAX_ROWS` and `ROW_BYTES`, whatever the number of images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from passes.calibration.followers import Followers, followers_of
from passes.calibration.layer_solver import Sample
from passes.calibration.paired_walk import Walk
from passes.calibration.rows import input_rows, output_positions, output_rows
from passes.errors import InputError
from passes.layers.channel_cut import works_on_filters
from passes.layers.known.norms import scale_and_shift
from passes.tracing.operations import module_of

MAX_ROWS = 1 << 15
ROW_BYTES = 3 << 27  # of a layer's inputs, wanted outputs and offsets together, as float64


def followers_at(walk: Walk, stop: fx.Node) -> Followers:
    """What follows a layer; less is made of it where not everything is known, or the layer has several calls."""
    found = followers_of(walk.graphs[0], stop)
    calls = [node for node in walk.nodes if node.target == stop.target]
    if len(calls) > 1:
        each = [followers_of(walk.graphs[0], call) for call in calls]
        return Followers(None, None, all(around == Followers(None, None, True) for around in each))
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
            return Followers(None, None, False)
    if other is not None and (walk.route(stop, [other]) is None or not _fits(held.value(0, other, stop), y)):
        return Followers(norm, None, False)
    return found


def sample_at(walk: Walk, stop: fx.Node, around: Followers) -> Sample:
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
