"""Allocation: the ratios at which all layers together cost a limit, at the least sum of their errors.

1. Lagrange: for a price p, each layer takes the ratio that minimises ``error + p · cost``; the price at which the costs
   add up to the limit gives the least sum of errors.
2. Between two points of the grid a curve is taken as straight, that of an error and that of a cost. What a step from
   one price to the next leaves of the limit is spent layer by layer.
3. Truncation can't meet every ratio: where layers are small, single centroid entries are kept or given up until what is
   spent is nearest to the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from passes.calibration.budget.error_curves import GRID, Curve
from passes.compression.grouping import Groups

Choice: TypeAlias = NDArray[np.int64]  # an index into the ratios, for each layer

KNOTS = (*GRID, 1.0)  # the ratios at which the curve of a cost is known
STEPS = 97  # ratios a layer may take: every hundredth of the grid's span


def proportional(cost: float) -> Curve:
    """The curve of what costs `cost` with nothing pruned, and ``(1 − r)`` of that at a ratio r."""
    return cost * (1 - np.array(KNOTS))


def allocate(curves: Sequence[Curve], costs: Sequence[Curve], limit: float) -> list[float] | None:
    """The ratio of each layer at the least summed error, so that what remains costs `limit`.

    Args:
        curves: the errors of each layer at the ratios of `GRID`.
        costs: what each layer costs at the ratios of `KNOTS`; it does not grow with the ratio.
        limit: what all layers may cost together.

    Returns:
        A ratio per layer, or None where even the largest ratio costs too much.

    >>> flat, steep = np.linspace(0, 0.1, len(GRID)), np.linspace(0, 1, len(GRID))
    >>> allocate([flat, steep], [proportional(1.0), proportional(1.0)], 1.5)
    [0.5, 0.0]
    """
    ratios = np.linspace(GRID[0], GRID[-1], STEPS)
    errors = np.array([np.interp(ratios, GRID, curve) for curve in curves])
    spent = np.array([np.interp(ratios, KNOTS, cost) for cost in costs])
    if spent[:, -1].sum() > limit * (1 + 1e-9):  # beyond what rounding makes of a limit that is just this sum
        return None
    cheap, dear = spent.argmin(1), np.zeros(len(curves), dtype=np.int64)  # what a high and a low price choose
    low, high = -60.0, 60.0  # logarithms of the price per share of the whole cost
    for _ in range(60):
        price = np.exp((low + high) / 2) / (spent[:, 0].sum() or 1.0)
        choice = (errors + price * spent).argmin(1)
        if np.take_along_axis(spent, choice[:, None], 1).sum() <= limit:
            cheap, high = choice, (low + high) / 2
        else:
            dear, low = choice, (low + high) / 2
    return [float(ratio) for ratio in _filled(ratios, spent, cheap, dear, limit).round(6)]


def _filled(ratios: Curve, spent: Curve, pruned: Choice, kept: Choice, limit: float) -> Curve:
    """Go from the ratios `pruned` towards `kept`, layer by layer, until the limit is spent."""
    found, used = ratios[pruned], np.take_along_axis(spent, pruned[:, None], 1)[:, 0]
    for layer, costs in enumerate(spent):
        may = used[layer] + max(0.0, limit - used.sum())
        wish = np.interp(may, costs[::-1], ratios[::-1])  # the smallest ratio at which it costs no more
        found[layer] = min(found[layer], max(wish, ratios[kept[layer]]))
        used[layer] = np.interp(found[layer], ratios, costs)
    return found


def settle(ratios: Sequence[float], groups: Sequence[Groups], costs: Sequence[Curve], limit: float) -> list[float]:
    """Move ratios to ones that truncation meets exactly, so that what remains costs as nearly `limit` as it can.

    Args:
        ratios: the wished ratio of each layer.
        groups: labels and centroids of each layer.
        costs: what each layer costs at the ratios of `KNOTS`.
        limit: what all layers should cost together.
    """
    possible = [_possible_ratios(each) for each in groups]
    chosen = [int(np.abs(each - ratio).argmin()) for each, ratio in zip(possible, ratios, strict=True)]
    spent = [np.interp(each, KNOTS, cost) for each, cost in zip(possible, costs, strict=True)]
    over = sum(each[i] for each, i in zip(spent, chosen, strict=True)) - limit
    while True:
        moves = [
            (abs(over + each[j] - each[i]), layer, j)
            for layer, (each, i) in enumerate(zip(spent, chosen, strict=True))
            for j in (i - 1, i + 1)
            if 0 <= j < len(each)
        ]
        nearest, layer, index = min(moves, default=(abs(over), 0, 0))
        if nearest >= abs(over):
            return [float(each[i]) for each, i in zip(possible, chosen, strict=True)]
        over += spent[layer][index] - spent[layer][chosen[layer]]
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
