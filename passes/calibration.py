"""Calibration: the kept weights of a compressed model, re-solved layer by layer in closed form on unlabelled data.

Both graphs are walked in step (`tandem.py`). At each regrouped layer, in order of execution:

1. X is what the layer reads in the *compressed* network, so that it makes up for what the layers before it have lost.
2. It is aimed at what the dense network has at the end of the layer's `surroundings`: behind the norm, and,
   where another branch is added to it, at the dense *sum*, so that it also makes up for what that branch lacks,
   wherever that is known already.
3. Where a ReLU follows, what it clips does not count (`least_squares.clipped_targets`).
4. A layer without a bias gets one in the running mean of the norm behind it. No other statistic is touched: the output
   of a least-squares fit has less variance than its target, and a norm that restored it would only amplify the error.
5. Layers with more than `MAX_PRIMAL` unfolded inputs are solved in the dual, on as many rows as memory allows.

Rows are sampled positions of the layer's output, at most `MAX_ROWS` and `ROW_BYTES`, whatever the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.errors import InputError
from passes.least_squares import clipped_targets, factor, ridge, solve, solve_dual
from passes.surroundings import Surroundings, affine, surroundings
from passes.tandem import Walk, module_of
from passes.unfolding import input_rows, output_positions, output_rows

MAX_ROWS = 1 << 15
ROW_BYTES = 3 << 27
MAX_PRIMAL = 8000
CLIPPING_ROUNDS = 5


@dataclass(frozen=True)
class Sample:
    """What is known of a layer at sampled positions.

    The layer's output y is followed by ``y · scale + offset``, which should be `wanted`.

    Attributes:
        inputs: ``[rows, D]``, the unfolded inputs of the compressed layer.
        wanted: float64 ``[rows, C_out]``.
        offset: float64 ``[rows, C_out]``: the norm's shift, and what another branch adds.
        scale: float64 ``[C_out]``.
        clipped: whether only what is above zero of it is read.
    """

    inputs: Tensor
    wanted: Tensor
    offset: Tensor
    scale: Tensor
    clipped: bool


def calibrate_region(
    dense: fx.GraphModule, small: fx.GraphModule, batches: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
) -> dict[str, Tensor]:
    """Re-solve all regrouped layers of one traced part, in place in `small`.

    Args:
        dense: the eval graph of the dense model.
        small: the eval graph of the compressed one.
        batches: the arguments of every batch, for the dense and for the compressed graph.

    Returns:
        What has changed: new values of parameters and buffers, by their names in `small`.

    Raises:
        InputError: the graphs differ, the batches do not fit, or a layer yields NaN or infinite values.
    """
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        walk = Walk(dense, small, batches)
        for stop in walk.stops():
            layer: Any = walk.module(stop)
            around = surroundings_at(walk, stop)
            norm: Any = None if around.norm is None else walk.module(around.norm)
            sample = sample_at(walk, stop, around)
            folded = norm is not None and layer.bias is None
            weight, bias = resolve(layer, sample, intercept=folded or layer.bias is not None)
            if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise InputError(f"layer {stop.target!r} reads or yields NaN or infinite values on the data")
            changed |= _written(layer, "weight", f"{stop.target}.weight", weight)
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
    if norm is not None and sum(node.target == norm.target for node in walk.nodes) > 1:
        return Surroundings(None, None, False)
    if other is not None and walk.route(stop, [other]) is None:
        return Surroundings(norm, None, False)
    return found


def sample_at(walk: Walk, stop: fx.Node, around: Surroundings) -> Sample:
    """Bring all batches before `stop`, and collect what its layer reads there and should yield."""
    layer: Any = walk.module(stop)
    inputs, wanted, offsets = [], [], []
    generator = torch.Generator().manual_seed(0)
    calls = walk.calls_with(stop)
    share = len(walk.batches) * len(calls)
    (scale, shift), (own_scale, own_shift) = (_affine(graph, around.norm, layer) for graph in walk.graphs)
    for held in walk.at(stop):
        for call in calls:
            y = held.value(0, call, stop)
            if around.other is not None and not _fits(held.value(0, around.other, stop), y):
                around = Surroundings(around.norm, None, False)
            positions = _positions(layer, y, share, generator)
            inputs.append(input_rows(layer, held.value(1, call.all_input_nodes[0], stop), positions))
            goal = output_rows(layer, y, positions).double() * scale + shift
            offset = own_shift.expand_as(goal)
            if around.other is not None:
                theirs, ours = (held.value(side, around.other, stop).expand_as(y) for side in (0, 1))
                goal = goal + output_rows(layer, theirs, positions)
                offset = offset + output_rows(layer, ours, positions)
            wanted.append(goal)
            offsets.append(offset)
    return Sample(torch.cat(inputs), torch.cat(wanted), torch.cat(offsets), own_scale, around.clipped)


def _fits(other: object, y: Tensor) -> bool:
    """Whether adding `other` leaves the shape of `y` as it is."""
    if not isinstance(other, Tensor) or other.dim() > y.dim():
        return False
    behind = y.shape[y.dim() - other.dim() :]
    return all(size in (1, wanted) for size, wanted in zip(other.shape, behind, strict=True))


def _affine(graph: fx.GraphModule, norm: fx.Node | None, layer: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift behind a layer in one of the graphs: of the norm there, or 1 and 0."""
    if norm is not None:
        return affine(module_of(graph, norm))
    ones = torch.ones(layer._dense_shape[0], dtype=torch.float64, device=layer.weight.device)
    return ones, torch.zeros_like(ones)


def _positions(layer: Any, y: Tensor, share: int, generator: torch.Generator) -> Tensor:
    """Which positions of one batch's output are sampled: at most one of `share` parts of all rows that are allowed."""
    shape = layer._dense_shape
    row = 8 * math.prod(shape[1:])
    count = output_positions(layer, y)
    most = max(1, min(MAX_ROWS, ROW_BYTES // row) // share)
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most]


def resolve(layer: Any, sample: Sample, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Solve for the packed weight of a grouped layer, and its bias ``[C_out]`` (0 without `intercept`), in float64."""
    start = layer.dense_weight().double().flatten(1)
    problem = _Problem(layer, sample, start, intercept)
    weight, bias = problem.solve((sample.wanted - sample.offset) / problem.scale)
    for _ in range(CLIPPING_ROUNDS if sample.clipped and problem.primal else 0):
        present = problem.outputs(weight, bias) * problem.scale + sample.offset
        weight, bias = problem.solve((clipped_targets(sample.wanted, present) - sample.offset) / problem.scale)
    rows = weight.view(layer._dense_shape).flatten(0, 1)[layer._rows]
    return rows.view_as(layer.weight), bias


class _Problem:
    """The least squares of one layer, to be solved for one set of targets after the other."""

    def __init__(self, layer: Any, sample: Sample, start: Tensor, intercept: bool) -> None:
        self._start, self._intercept = start, intercept
        # A filter that the norm multiplies by next to nothing has no say: it keeps its weights.
        self._live = sample.scale.abs() > 1e-6 * sample.scale.abs().max()
        self.scale = torch.where(self._live, sample.scale, 1.0)
        x = sample.inputs.double()
        self._mean = x.mean(0) if intercept else torch.zeros_like(x[0])
        self._x = x - self._mean
        self._groups = list(_columns(layer))
        self.primal = self._x.shape[1] <= MAX_PRIMAL
        self._ridge = ridge(self._x.square().sum(0))
        if self.primal:
            self._gram = self._x.T @ self._x
            self._factors = [factor(self._gram[keep][:, keep], self._ridge) for _, keep in self._groups]

    def outputs(self, weight: Tensor, bias: Tensor) -> Tensor:
        """What the layer yields with these weights, ``[rows, C_out]``."""
        return self._x @ weight.T + (bias + weight @ self._mean)

    def solve(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[C_out, D]`` and bias ``[C_out]`` for `targets` ``[rows, C_out]``."""
        middle = targets.mean(0) if self._intercept else torch.zeros_like(targets[0])
        targets = targets - middle
        weight = self._start.clone()
        product = self._x.T @ targets if self.primal else None
        for index, (filters, keep) in enumerate(self._groups):
            start = self._start[filters][:, keep]
            if product is not None:
                solved = solve(self._factors[index], self._gram[keep][:, keep], product[keep][:, filters], start)
            else:
                solved = solve_dual(self._x[:, keep], targets[:, filters], start, self._ridge)
            weight[filters[:, None], keep] = solved
        weight = torch.where(self._live[:, None], weight, self._start)
        return weight, middle - weight @ self._mean


def _columns(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group that reads something: its filters, and the columns of the unfolded input that it reads."""
    taps = math.prod(layer._dense_shape[2:])
    filters, inputs = layer.block_sizes.unbind(1)
    for own, read in zip(layer.filters.split(filters.tolist()), layer.inputs.split(inputs.tolist()), strict=True):
        if len(read):
            yield own, (read[:, None] * taps + torch.arange(taps, device=read.device)).flatten()
