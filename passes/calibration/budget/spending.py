"""Spending: ratios that keep a budget at the least error on the calibration data.

1. The layers whose ratio is free get those at which their error curves add up to least, within what the others leave.
2. Error curves see each layer by itself. So ratios half-way to one for all layers, and that one, which cost as much,
   are tried too, as long as the network as a whole gets better.
3. Where filters that nobody reads are removed, the model is smaller than its ratios say: they are lowered until it
   meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from passes.calibration.budget.allocation import achieved, allocate, settle
from passes.calibration.budget.error_curves import CURVES, Curve
from passes.calibration.budget.judging import held_out_error
from passes.calibration.data import EXAMPLES
from passes.compression.grouping import GROUPS, Groups
from passes.compression.lowering import lowered_copy
from passes.compression.pruning import PLANS, Pruning
from passes.compression.selection import REASONS, TARGETS, Target, target_of
from passes.elimination.elimination import remove_unread_filters
from passes.errors import InputError
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.manager import run_passes
from passes.infra.progress import Progress, silent
from passes.options.settings import SETTINGS, Settings

PARTS = (1.0, 0.5, 0.0)  # of the way from one ratio for all layers to those of the error curves
TRIALS = 12  # of limits, where elimination takes away more than the ratios say
SCANNED = 33  # limits, where that ends further than `WORST` from the budget
TOLERANCE, WORST = 2e-3, 1e-2  # of the model's total


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

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


BUDGET = Fact[Budget]("budget")
MISSED = Fact[float]("missed")  # by which share of the total the budget is missed, beyond what truncation can't meet


class Spending(Pass):
    """Give the targets ratios that keep the budget; those that an override or ``linear_ratio`` gives one keep it.

    Args:
        progress: shows how far it is.
    """

    name = "spending"
    requires = (SETTINGS, TARGETS, REASONS, GROUPS, CURVES, EXAMPLES, BUDGET)
    ensures = (TARGETS, MISSED)

    def __init__(self, progress: Progress = silent) -> None:
        """Take what shows it."""
        self._progress = progress

    def run(self, compilation: Compilation) -> Facts:
        """Allot, judge, and lower the ratios where elimination takes away more."""
        budget, settings, allotment = compilation[BUDGET], compilation[SETTINGS], _allotment(compilation)
        limit, missed = allotment.limit, 0.0
        allotment.targets_at(limit, 1.0)  # or it can't be kept
        part = best_part(lambda part: self._error(compilation, allotment.targets_at(limit, part)))

        def over(limit: float) -> float:
            small = _trial(compilation, allotment.targets_at(limit, part))
            remove_unread_filters(small, settings.example_inputs, settings.leaf_modules)
            return budget.count(small)[""] / allotment.total - budget.share

        if budget.eliminating:
            limit, missed = best_limit(limit, sum(allotment.prices), over)
        return {TARGETS: allotment.targets_at(limit, part), MISSED: missed}

    def check(self, compilation: Compilation) -> str | None:
        """Truncation meets every ratio that was given."""
        for path, target in compilation[TARGETS].items():
            free = _is_free(path, compilation.model.get_submodule(path), compilation[SETTINGS])
            if free and abs(achieved(compilation[GROUPS][path], target.ratio) - target.ratio) > 1e-9:
                return f"layer {path!r} can't be pruned to a ratio of {target.ratio}"
        return None

    def _error(self, compilation: Compilation, targets: dict[str, Target]) -> float:
        """The error of the network that targets lead to; NaN where it can't be told."""
        model, leaves = compilation.model, compilation[SETTINGS].leaf_modules
        return held_out_error(model, _trial(compilation, targets), compilation[EXAMPLES], leaves, self._progress)


def _trial(compilation: Compilation, targets: dict[str, Target]) -> nn.Module:
    """The model that targets lead to, without its weights solved again."""
    known: Facts = {TARGETS: targets, REASONS: compilation[REASONS], GROUPS: compilation[GROUPS]}
    plans = run_passes((Pruning(),), Compilation(compilation.model, known))[PLANS]
    return lowered_copy(compilation.model, compilation[SETTINGS], plans)


@dataclass(frozen=True)
class _Allotment:
    """The layers whose ratios are free, and what they may cost.

    Attributes:
        targets: of all layers.
        free: paths of the layers whose ratio is free.
        curves, groups, prices: the error curve of each of these, its labels and centroids, and what it costs with
            nothing pruned.
        budget: what the model may cost.
        total, rest: what the model costs now, and what of that is none of these layers'.
    """

    targets: dict[str, Target]
    free: list[str]
    curves: list[Curve]
    groups: list[Groups]
    prices: list[float]
    budget: Budget
    total: float
    rest: float

    @property
    def limit(self) -> float:
        """What the free layers may cost together."""
        return self.budget.share * self.total - self.rest

    def targets_at(self, limit: float, part: float) -> dict[str, Target]:
        """The targets at which the free layers cost `limit`, a part of the way from one ratio to those of the curves.

        Raises:
            InputError: they can't cost so little.
        """
        ratios = allocate(self.curves, self.prices, limit)
        if ratios is None:
            raise InputError(
                f"budget of {self.budget.share:.3g} of all {self.budget.measure} can't be kept: what is left alone or "
                f"has a fixed ratio is {self.rest / self.total:.3g} of them, and every other layer keeps something; "
                "raise the budget, or ignore less"
            )
        even = 1 - min(1.0, limit / max(sum(self.prices), 1.0))
        wished = [even + part * (ratio - even) for ratio in ratios]
        settled = settle(wished, self.groups, self.prices, limit)
        return self.targets | {
            path: replace(self.targets[path], ratio=ratio) for path, ratio in zip(self.free, settled, strict=True)
        }


def _allotment(compilation: Compilation) -> _Allotment:
    """What there is to allot.

    Raises:
        InputError: a layer whose ratio is free was not measured.
    """
    budget, found, curves = compilation[BUDGET], compilation[GROUPS], compilation[CURVES]
    targets = dict(compilation[TARGETS])
    model, settings, counted = compilation.model, compilation[SETTINGS], budget.count(compilation.model)
    total, costs = float(counted[""]), {path: float(counted[path]) for path in targets}
    free = [path for path in targets if _is_free(path, model.get_submodule(path), settings)]
    unknown = [path for path in free if path not in curves]
    if unknown:
        raise InputError(
            f"budget needs every layer in a traced part of the model that runs in eval mode, and {unknown[0]!r} is in "
            f"none, or reads nothing there ({len(unknown)} such layers): give them a ratio in overrides, or ignore them"
        )
    pruned = {path: achieved(found[path], targets[path].ratio) for path in targets if path not in free}
    rest = total - sum(costs.values()) + sum(costs[path] * (1 - ratio) for path, ratio in pruned.items())
    groups, prices = [found[path] for path in free], [costs[path] for path in free]
    return _Allotment(targets, free, [curves[path] for path in free], groups, prices, budget, total, rest)


def _is_free(path: str, layer: nn.Module, settings: Settings) -> bool:
    """Whether nothing but the general ratio decides about a target."""
    low, high = (target_of(path, layer, replace(settings, ratio=ratio)).ratio for ratio in (0.0, 0.5))
    return low != high


def best_part(error: Callable[[float], float]) -> float:
    """The part of `PARTS` with the least error; no further ones are tried where it grows, or is NaN."""
    best, least = PARTS[0], np.inf
    for part in PARTS:
        found = error(part)
        if not found < least:
            break
        best, least = part, found
    return best


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
