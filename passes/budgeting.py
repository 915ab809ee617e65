"""Budgets: the ratio of each layer, so that the network as a whole keeps a given share of its cost at the least error.

1. A layer's error curve says what is left of its error after re-solving its weights, at a grid of ratios: the squared
   error of its output over the variance of what is passed on (behind the norm, with what another branch adds).
2. Lagrange: for a price p, each layer takes the ratio that minimises ``error + p · cost``; the price at which the costs
   add up to the limit gives the least sum of errors.
3. Between two points of the grid a curve is taken as straight. What a step from one price to the next leaves of the
   limit is spent layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from passes.calibration import Sample
from passes.facts import Groups
from passes.least_squares import factor, ridge, solve
from passes.pruning import truncate

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
    x = sample.inputs.double()
    x = x - x.mean(0)
    y = (sample.wanted - sample.offset) / torch.where(sample.scale == 0, 1.0, sample.scale)
    y = y - y.mean(0)
    gram, cross = x.T @ x, x.T @ y
    penalty, power, weight = ridge(gram.diagonal()), y.square().sum(0), sample.scale.square()
    taps = start.shape[1] // groups.centroids.shape[1]
    errors = []
    for ratio in GRID:
        kept = truncate(groups.centroids, torch.bincount(groups.labels), ratio).repeat_interleave(taps, 1)
        left = power.clone()
        for group, keep in enumerate(kept):
            filters = (groups.labels == group).nonzero().flatten()
            inner, outer = gram[keep][:, keep], cross[keep][:, filters]
            solved = solve(factor(inner, penalty), inner, outer, start[filters][:, keep])
            left[filters] += ((solved @ inner) * solved).sum(1) - 2 * (solved * outer.T).sum(1)
        errors.append(float((left * weight).sum()))
    passed_on = (sample.wanted - sample.wanted.mean(0)).square().sum()
    relative = np.array(errors) / max(float(passed_on), 1e-300)
    return np.maximum.accumulate(relative.clip(min=0.0))


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
