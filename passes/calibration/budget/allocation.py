"""Allocation: the ratios at which all layers together cost a limit, at the least sum of their errors.

1. Lagrange: for a price p, each layer takes the ratio that minimises ``error + p · cost``; the price at which the costs
   add up to the limit gives the least sum of errors.
2. Between two points of the grid a curve is taken as straight. What a step from one price to the next leaves of the
   limit is spent layer by layer.
3. Truncation can't meet every ratio: where layers are small, single centroid entries are kept or given up until what is
   spent is nearest to the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from passes.calibration.budget.error_curves import GRID, Curve
from passes.compression.grouping import Groups

STEPS = 97  # ratios a layer may take: every hundredth of the grid's span


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
