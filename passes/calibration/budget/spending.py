"""Spending: ratios that keep a budget at the least error on the calibration data.

1. The layers whose ratio is free get those at which their error curves add up to least, within what the others leave.
2. Error curves see each layer by itself. So ratios half-way to one for all layers, and that one, which cost as much,
   are tried too, as long as the network as a whole gets better.
3. Where the whole costs something else than its layers say, what they may cost is changed until the budget is met.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from passes.calibration.budget.allocation import achieved
from passes.calibration.budget.allotment import BUDGET, FIT, allotment_of, is_free, trial
from passes.calibration.budget.error_curves import CURVES
from passes.calibration.budget.judging import held_out_error
from passes.calibration.data import EXAMPLES
from passes.compression.grouping import GROUPS
from passes.compression.selection import REASONS, TARGETS, Target
from passes.infra.compilation import Compilation, Facts, Pass
from passes.infra.progress import Progress, silent
from passes.options.settings import SETTINGS

PARTS = (1.0, 0.5, 0.0)  # of the way from one ratio for all layers to those of the error curves


class Spending(Pass):
    """Give the targets ratios that keep the budget; those that an override or ``linear_ratio`` gives one keep it.

    Args:
        progress: shows how far it is.
    """

    name = "spending"
    requires = (SETTINGS, TARGETS, REASONS, GROUPS, CURVES, EXAMPLES, BUDGET)
    ensures = (TARGETS, FIT)

    def __init__(self, progress: Progress = silent) -> None:
        """Take what shows it."""
        self._progress = progress

    def run(self, compilation: Compilation) -> Facts:
        """Allot, judge, and see what the whole costs."""
        allotment = allotment_of(compilation)
        costs = compilation[BUDGET].costs(compilation, allotment)
        allotment.targets_at(costs, costs.limit, 1.0)  # or it can't be kept
        part = best_part(lambda part: self._error(compilation, allotment.targets_at(costs, costs.limit, part)))

        def trial_at(limit: float) -> nn.Module:
            return trial(compilation, allotment.targets_at(costs, limit, part))

        fit = costs.fit(trial_at)
        return {TARGETS: allotment.targets_at(costs, fit.limit, part), FIT: fit}

    def check(self, compilation: Compilation) -> str | None:
        """Truncation meets every ratio that was given."""
        for path, target in compilation[TARGETS].items():
            free = is_free(path, compilation.model.get_submodule(path), compilation[SETTINGS])
            if free and abs(achieved(compilation[GROUPS][path], target.ratio) - target.ratio) > 1e-9:
                return f"layer {path!r} can't be pruned to a ratio of {target.ratio}"
        return None

    def _error(self, compilation: Compilation, targets: dict[str, Target]) -> float:
        """The error of the network that targets lead to; NaN where it can't be told."""
        model, leaves = compilation.model, compilation[SETTINGS].leaf_modules
        return held_out_error(model, trial(compilation, targets), compilation[EXAMPLES], leaves, self._progress)


def best_part(error: Callable[[float], float]) -> float:
    """The part of `PARTS` with the least error; no further ones are tried where it grows, or is NaN."""
    best, least = PARTS[0], np.inf
    for part in PARTS:
        found = error(part)
        if not found < least:
            break
        best, least = part, found
    return best
