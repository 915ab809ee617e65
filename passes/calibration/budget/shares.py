"""Shares: a budget of what is counted, such as MACs, as the share of the model's total that remains.

Where filters that nobody reads are removed, the model is smaller than its ratios say: they are lowered until it meets
the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from passes.calibration.budget.allocation import achieved, proportional
from passes.calibration.budget.allotment import Allotment, Budget, Costs, Fit
from passes.compression.grouping import GROUPS
from passes.elimination.elimination import remove_unread_filters
from passes.infra.compilation import Compilation
from passes.options.settings import SETTINGS

TRIALS = 12  # of limits, where elimination takes away more than the ratios say
SCANNED = 33  # limits, where that ends further than `WORST` from the budget
TOLERANCE, WORST = 2e-3, 1e-2  # of the model's total


@dataclass(frozen=True)
class ShareBudget(Budget):
    """The share of a model's total that remains.

    Attributes:
        measure: what is counted, for messages.
        share: of the model's total that remains.
        count: what a model costs, by the path of each layer, with the total under "".
        eliminating: whether filters that nobody reads are removed afterwards.
    """

    measure: str
    share: float
    count: Callable[[nn.Module], Mapping[str, float]]
    eliminating: bool = False

    def costs(self, compilation: Compilation, allotment: Allotment) -> Costs:
        """Count the model: what remains of a layer costs its share."""
        targets, settings = allotment.targets, compilation[SETTINGS]
        counted = self.count(compilation.model)
        total, costs = float(counted[""]), {path: float(counted[path]) for path in targets}
        pruned = {
            path: achieved(compilation[GROUPS][path], target.ratio)
            for path, target in targets.items()
            if path not in allotment.groups
        }
        rest = total - sum(costs.values()) + sum(costs[path] * (1 - ratio) for path, ratio in pruned.items())
        refusal = (
            f"budget of {self.share:.3g} of all {self.measure} can't be kept: what is left alone or "
            f"has a fixed ratio is {rest / total:.3g} of them, and every other layer keeps something; "
            "raise the budget, or ignore less"
        )

        def over(small: nn.Module) -> float:
            remove_unread_filters(small, settings.example_inputs, settings.leaf_modules)
            return self.count(small)[""] / total - self.share

        curves = {path: proportional(costs[path]) for path in allotment.groups}
        limit = self.share * total - rest
        return EliminatedCosts(curves, limit, refusal, over) if self.eliminating else Costs(curves, limit, refusal)


@dataclass(frozen=True)
class EliminatedCosts(Costs):
    """Costs of a model of which elimination will take away more.

    Attributes:
        over: by which share of the total a model is above its budget, once its unread filters are removed from it.
    """

    over: Callable[[nn.Module], float]

    def fit(self, trial_at: Callable[[float], nn.Module]) -> Fit:
        """Raise the limit, until what elimination leaves meets the budget."""
        most = sum(float(curve[0]) for curve in self.curves.values())
        limit, missed = best_limit(self.limit, most, lambda limit: self.over(trial_at(limit)))
        why = "of the total: what elimination takes away leaves no ratios that come nearer"
        return Fit(limit, f"by {100 * missed:.1f} % {why}" if missed > 0 else "")


def best_limit(low: float, high: float, over: Callable[[float], float]) -> tuple[float, float]:
    """A limit between `low` and `high` at which a model is as little `over` its share as can be found.

    Returns:
        The limit, and how far it is off; 0 where that is next to nothing.
    """
    tried: list[tuple[float, float]] = []
    most, limit = high, low
    for _ in range(TRIALS):
        missed = over(limit)
        tried.append((abs(missed), limit))
        if abs(missed) < TOLERANCE:
            return limit, 0.0
        low, high = (limit, high) if missed < 0 else (low, limit)
        limit = (low + high) / 2
    if min(tried)[0] > WORST:  # small networks: what elimination takes away jumps up and down with the limit
        tried += [(abs(over(float(each))), float(each)) for each in np.linspace(tried[0][1], most, SCANNED)]
    missed, limit = min(tried)
    return limit, missed if missed > WORST else 0.0
