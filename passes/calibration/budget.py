"""Budgets: the ratio of each layer, so that the network as a whole keeps a given share of its cost at the least error.

1. A layer's error curve says what is left of its error after re-solving its weights, at a grid of ratios: the squared
   error of its output over the variance of what is passed on (behind the norm, with what another branch adds). It is
   solved on the first half of the rows and measured on the rest: with few rows, every layer could be fitted to its own.
2. Lagrange: for a price p, each layer takes the ratio that minimises ``error + p · cost``; the price at which the costs
   add up to the limit gives the least sum of errors.
3. Between two points of the grid a curve is taken as straight. What a step from one price to the next leaves of the
   limit is spent layer by layer.
4. Truncation can't meet every ratio: where layers are small, single centroid entries are kept or given up until what is
   spent is nearest to the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.calibration.layer_solver import Sample
from passes.calibration.least_squares import factor, ridge, solve, solve_dual
from passes.compression.grouping import Groups
from passes.compression.pruning import truncate

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
STEPS = 97  # ratios a layer may take: every hundredth of the grid's span
Curve = NDArray[np.float64]


def error_curve(layer: Any, sample: Sample, groups: Groups) -> Curve:
    """The error that is left of a layer at each ratio of `GRID`, re-solved: 0 for none, 1 where nothing is explained.

    Args:
        layer: the layer as a grouped one with nothing pruned.
        sample: what it reads and should yield.
        groups: its labels and centroids.
    """
    start = layer.dense_weight().double().flatten(1)
    halves = _halves(sample)
    if start.shape[1] <= len(halves.x):
        left_of: Callable[[Tensor, Tensor, Tensor], Tensor] = _Primal(halves).left_of
    else:
        left_of = halves.left_of
    weight = sample.scale.square()
    taps = start.shape[1] // groups.centroids.shape[1]
    members = [(groups.labels == group).nonzero().flatten() for group in range(len(groups.centroids))]
    errors = []
    for ratio in GRID:
        kept = truncate(groups.centroids, torch.bincount(groups.labels), ratio).repeat_interleave(taps, 1)
        pairs = [(filters, keep.nonzero().flatten()) for filters, keep in zip(members, kept, strict=True)]
        errors.append(sum(float(left_of(f, k, start[f][:, k]) @ weight[f]) for f, k in pairs))
    passed_on = (sample.wanted[-len(halves.rest_y) :] - sample.wanted.mean(0)).square().sum()
    relative = np.array(errors) / max(float(passed_on), 1e-300)
    return np.maximum.accumulate(relative.clip(min=0.0))


@dataclass(frozen=True)
class _Halves:
    """Rows to solve on, the rest to measure on, both less the mean of the first, and the ridge of the first."""

    x: Tensor
    y: Tensor
    rest_x: Tensor
    rest_y: Tensor
    penalty: Tensor

    def left_of(self, filters: Tensor, keep: Tensor, start: Tensor) -> Tensor:
        """The squared error ``[filters]`` on the rest, with the kept inputs re-solved from `start`; by the dual."""
        x = self.x[:, keep]
        weight = start + solve_dual(x, self.y[:, filters] - x @ start.T, self.penalty)
        return (self.rest_y[:, filters] - self.rest_x[:, keep] @ weight.T).square().sum(0)


def _halves(sample: Sample) -> _Halves:
    y = (sample.wanted - sample.offset) / torch.where(sample.scale == 0, 1.0, sample.scale)
    half = len(y) // 2 or len(y)  # a single row is all there is
    x = sample.inputs - sample.inputs[:half].mean(0, dtype=torch.float64)
    y -= y[:half].mean(0)
    rest = slice(half, None) if half < len(y) else slice(None)
    return _Halves(x[:half], y[:half], x[rest], y[rest], ridge(x[:half].square().sum(0)))


class _Primal:
    """The same from products that all groups and ratios share, which is less work where rows are many."""

    def __init__(self, halves: _Halves) -> None:
        self._gram, self._cross = halves.x.T @ halves.x, halves.x.T @ halves.y
        self._rest_gram, self._rest_cross = halves.rest_x.T @ halves.rest_x, halves.rest_x.T @ halves.rest_y
        self._power = halves.rest_y.square().sum(0)
        self._ridge = halves.penalty

    def left_of(self, filters: Tensor, keep: Tensor, start: Tensor) -> Tensor:
        """See `_Halves.left_of`."""
        cells = keep[:, None], keep
        cross = self._cross[keep[:, None], filters] - self._gram[cells] @ start.T
        weight = start + solve(factor(self._gram, keep, self._ridge), cross)
        outer = self._rest_cross[keep[:, None], filters].T
        return self._power[filters] + ((weight @ self._rest_gram[cells]) * weight).sum(1) - 2 * (weight * outer).sum(1)


def allocate(curves: Sequence[Curve], costs: Sequence[float], limit: float) -> list[float] | None:
    """The ratio of each layer at the least summed error, so that what remains costs `limit`.

    Args:
        curves: the errors of each layer at the ratios of `GRID`.
        costs: the cost of each layer with nothing pruned; at a ratio r it is ``(1 − r)`` of that.
        limit: what all layers may cost together.

    Returns:
        A ratio per layer, or None where even the largest ratio costs too much.

    >>> flat, steep = np.linspace(0, 0.1, len(GRID)), np.linspace(0, 1, len(GRID))
    >>> allocate([flat, steep], [1.0, 1.0], 1.5)
    [0.5, 0.0]
    """
    ratios = np.linspace(GRID[0], GRID[-1], STEPS)
    errors = np.array([np.interp(ratios, GRID, curve) for curve in curves])
    spent = np.outer(costs, 1 - ratios)
    if spent[:, -1].sum() > limit:
        return None
    cheap, dear = spent.argmin(1), np.zeros(len(curves), dtype=np.int64)  # what a high and a low price choose
    low, high = -60.0, 60.0  # logarithms of the price per share of the whole cost
    for _ in range(60):
        price = np.exp((low + high) / 2) / sum(costs)
        choice = (errors + price * spent).argmin(1)
        if np.take_along_axis(spent, choice[:, None], 1).sum() <= limit:
            cheap, high = choice, (low + high) / 2
        else:
            dear, low = choice, (low + high) / 2
    return [float(ratio) for ratio in _filled(ratios[cheap], ratios[dear], np.array(costs), limit).round(6)]


def _filled(pruned: Curve, kept: Curve, costs: Curve, limit: float) -> Curve:
    """Go from the ratios `pruned` towards `kept`, layer by layer, until the limit is spent."""
    found = pruned.copy()
    for layer, cost in enumerate(costs):
        free = limit - float(((1 - found) * costs).sum())
        wish = max(0.0, float(pruned[layer] - kept[layer]))
        found[layer] -= min(wish, max(0.0, free / cost)) if cost else 0.0
    return found


def settle(ratios: Sequence[float], groups: Sequence[Groups], costs: Sequence[float], limit: float) -> list[float]:
    """Move ratios to ones that truncation meets exactly, so that what remains costs as nearly `limit` as it can.

    Args:
        ratios: the wished ratio of each layer.
        groups: labels and centroids of each layer.
        costs: the cost of each layer with nothing pruned.
        limit: what all layers should cost together.
    """
    possible = [_possible_ratios(each) for each in groups]
    chosen = [int(np.abs(each - ratio).argmin()) for each, ratio in zip(possible, ratios, strict=True)]
    over = sum(cost * (1 - each[i]) for cost, each, i in zip(costs, possible, chosen, strict=True)) - limit
    while True:
        moves = [
            (abs(over - cost * (each[j] - each[i])), layer, j)
            for layer, (cost, each, i) in enumerate(zip(costs, possible, chosen, strict=True))
            for j in (i - 1, i + 1)
            if 0 <= j < len(each)
        ]
        nearest, layer, index = min(moves, default=(abs(over), 0, 0))
        if nearest >= abs(over):
            return [float(each[i]) for each, i in zip(possible, chosen, strict=True)]
        over -= costs[layer] * (possible[layer][index] - possible[layer][chosen[layer]])
        chosen[layer] = index


def achieved(groups: Groups, ratio: float) -> float:
    """The ratio that truncation meets where `ratio` is asked for."""
    possible = _possible_ratios(groups)
    return float(possible[np.abs(possible - ratio).argmin()])


def _possible_ratios(groups: Groups) -> Curve:
    """The share of a layer's connections that is gone after each truncated entry, from none on; see `truncate`."""
    sizes = torch.bincount(groups.labels)
    order = torch.argsort(groups.centroids.flatten(), stable=True)[:-1]
    gone = torch.cumsum(sizes.repeat_interleave(groups.centroids.shape[1])[order], 0)
    shares: Curve = (gone.double() / (len(groups.labels) * groups.centroids.shape[1])).cpu().numpy()
    return np.concatenate([np.zeros(1), shares])
