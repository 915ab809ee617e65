"""The kept weights of one layer, re-solved for what is known of it at sampled positions.

1. Groups are least-squares problems of their own (`least_squares.py`) that share ``XᵀX``. Factors of some of them are
   held at a time, at most `FACTOR_BYTES`.
2. Where a ReLU follows, what it clips does not count: the same factors are used again for targets that follow the
   present output below zero, `CLIPPING_ROUNDS` times.
3. Layers with more than `MAX_PRIMAL` unfolded inputs are solved in the dual, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.calibration.least_squares import clipped_targets, factor, ridge, solve, solve_dual

MAX_PRIMAL = 8000
FACTOR_BYTES = 1 << 29
CLIPPING_ROUNDS = 5
Groups = list[tuple[Tensor, Tensor]]  # of each: its filters, and the columns of the unfolded input that it reads


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


def resolve(layer: Any, sample: Sample, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """Solve for the packed weight of a grouped layer, and its bias ``[C_out]`` (0 without `intercept`), in float64."""
    problem = _Problem(layer, sample, intercept)
    weight = problem.start.clone()
    bias = torch.zeros_like(sample.scale) if layer.bias is None else layer.bias.double()
    for groups in _batched(list(_columns(layer))):
        filters = torch.cat([own for own, _ in groups])
        live = problem.live[filters]
        solved, shift = problem.solve(groups)
        weight[filters[live]], bias[filters[live]] = solved[live], shift[live]
    return layer.packed_rows(weight.view(layer.dense_shape)).view_as(layer.weight), bias


class _Problem:
    """The least squares of one layer."""

    def __init__(self, layer: Any, sample: Sample, intercept: bool) -> None:
        self.start = layer.dense_weight().double().flatten(1)
        self._sample, self._intercept = sample, intercept
        # A filter that the norm multiplies by next to nothing has no say: it keeps its weights and its bias.
        self.live = sample.scale.abs() > 1e-6 * sample.scale.abs().max()
        self._scale = torch.where(self.live, sample.scale, 1.0)
        mean = sample.inputs.mean(0, dtype=torch.float64)
        self._mean = mean if intercept else torch.zeros_like(mean)
        self._x = sample.inputs - self._mean  # float64
        self._ridge = ridge(self._x.square().sum(0))
        self._gram = self._x.T @ self._x if self._x.shape[1] <= MAX_PRIMAL else None

    def solve(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Weights ``[filters, D]`` and bias ``[filters]`` of some groups, the filters of one after those of another."""
        filters = torch.cat([own for own, _ in groups])
        sample, start, scale = self._sample, self.start[filters], self._scale[filters]
        wanted, offset = sample.wanted[:, filters], sample.offset[:, filters]
        change = self._solver(groups, start)

        def solved(targets: Tensor) -> tuple[Tensor, Tensor]:
            targets = (targets - offset) / scale
            middle = targets.mean(0) if self._intercept else torch.zeros_like(targets[0])
            weight = start + change(targets.sub_(middle))
            return weight, middle - weight @ self._mean

        weight, bias = solved(wanted)
        for _ in range(CLIPPING_ROUNDS if sample.clipped and self._gram is not None else 0):
            present = (self._x @ weight.T + (bias + weight @ self._mean)) * scale + offset
            weight, bias = solved(clipped_targets(wanted, present))
        return weight, bias

    def _solver(self, groups: Groups, start: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from centred targets ``[rows, filters]`` to the change of the weights `start` that meets them."""
        x, gram = self._x, self._gram
        every = torch.arange(len(start), device=start.device)
        parts = list(zip(torch.split(every, [len(own) for own, _ in groups]), (k for _, k in groups), strict=True))
        if gram is None:
            explained = x @ start.T

            def change(targets: Tensor) -> Tensor:
                left = targets - explained
                found = [solve_dual(x[:, keep], left[:, own], self._ridge) for own, keep in parts]
                return _joined(parts, found, start)
        else:
            factors = [factor(gram, keep, self._ridge) for _, keep in parts]
            explained = gram @ start.T  # Xᵀ(Y − XW⁰ᵀ) = XᵀY − (XᵀX)W⁰ᵀ: a product with all rows less in every round

            def change(targets: Tensor) -> Tensor:
                cross = x.T @ targets - explained
                found = [solve(f, cross[keep[:, None], own]) for f, (own, keep) in zip(factors, parts, strict=True)]
                return _joined(parts, found, start)

        return change


def _joined(parts: Groups, found: list[Tensor], like: Tensor) -> Tensor:
    """What was found for the filters and columns of each part, in one tensor, with 0 elsewhere."""
    whole = torch.zeros_like(like)
    for (own, keep), part in zip(parts, found, strict=True):
        whole[own[:, None], keep] = part
    return whole


def _batched(groups: Groups) -> Iterator[Groups]:
    """Groups in lists whose Cholesky factors take at most `FACTOR_BYTES`, or of one group."""
    batch: Groups = []
    for group in groups:
        if batch and sum(8 * len(keep) ** 2 for _, keep in [*batch, group]) > FACTOR_BYTES:
            yield batch
            batch = []
        batch.append(group)
    yield batch


def _columns(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """For each group: its filters, and the columns of the unfolded input that it reads."""
    taps = math.prod(layer.dense_shape[2:])
    filters, inputs = layer.block_sizes.unbind(1)
    for own, read in zip(layer.filters.split(filters.tolist()), layer.inputs.split(inputs.tolist()), strict=True):
        yield own, (read[:, None] * taps + torch.arange(taps, device=read.device)).flatten()
