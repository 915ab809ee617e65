"""Allotment: the layers whose ratios are free, and the targets at which they cost a limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from passes.calibration.budget.allocation import KNOTS, achieved, allocate, settle
from passes.calibration.budget.error_curves import CURVES, Curve
from passes.compression.grouping import GROUPS, Groups
from passes.compression.lowering import lowered_copy
from passes.compression.pruning import PLANS, Pruning
from passes.compression.selection import REASONS, TARGETS, Target, target_of
from passes.errors import InputError
from passes.infra.compilation import Compilation, Fact, Facts
from passes.infra.manager import run_passes
from passes.options.settings import SETTINGS, Settings


@dataclass(frozen=True)
class Fit:
    """How a budget was met.

    Attributes:
        limit: what the free layers may cost together.
        missed: how the budget is missed, in words, or "".
        model: the model at this limit as it was measured, its weights not solved again, if it was.
    """

    limit: float
    missed: str = ""
    model: nn.Module | None = None


FIT = Fact[Fit]("fit")


@dataclass(frozen=True)
class Costs:
    """What the free layers cost, and what they may.

    Attributes:
        curves: what each costs at the ratios of `KNOTS`, by path; it does not grow with the ratio.
        limit: what they may cost together.
        refusal: what is said where they can't cost so little.
    """

    curves: Mapping[str, Curve]
    limit: float
    refusal: str

    def fit(self, trial_at: Callable[[float], nn.Module]) -> Fit:
        """The limit at which the whole model meets the budget; `trial_at` makes the one at a limit."""
        return Fit(self.limit)


class Budget(ABC):
    """What a model may cost."""

    @abstractmethod
    def costs(self, compilation: Compilation, allotment: Allotment) -> Costs:
        """Find out what the free layers of an allotment cost; of the compilation it may ask what `Spending` may.

        Raises:
            InputError: the budget can't be kept.
        """


BUDGET = Fact[Budget]("budget")


@dataclass(frozen=True)
class Allotment:
    """The layers whose ratios are free.

    Attributes:
        targets: of all layers.
        groups, errors: labels and centroids, and the error curve, of each layer whose ratio is free.
    """

    targets: dict[str, Target]
    groups: Mapping[str, Groups]
    errors: Mapping[str, Curve]

    def targets_at(self, costs: Costs, limit: float, part: float) -> dict[str, Target]:
        """The targets at which the free layers cost `limit`, a part of the way from one ratio to those of the curves.

        Raises:
            InputError: they can't cost so little.
        """
        curves = [costs.curves[path] for path in self.groups]
        ratios = allocate(list(self.errors.values()), curves, limit)
        if ratios is None:
            raise InputError(costs.refusal)
        even = float(np.interp(limit, np.sum(curves, 0)[::-1], KNOTS[::-1]))
        wished = [even + part * (ratio - even) for ratio in ratios]
        return self._with(settle(wished, list(self.groups.values()), curves, limit))

    def evenly(self, ratio: float) -> dict[str, Target]:
        """The targets with one ratio for all free layers, as nearly as truncation can meet it."""
        return self._with(achieved(each, ratio) for each in self.groups.values())

    def _with(self, ratios: Iterable[float]) -> dict[str, Target]:
        free = zip(self.groups, ratios, strict=True)
        return self.targets | {path: replace(self.targets[path], ratio=ratio) for path, ratio in free}


def allotment_of(compilation: Compilation) -> Allotment:
    """What there is to allot.

    Raises:
        InputError: no ratio is free, or a layer whose ratio is free was not measured.
    """
    model, settings, curves = compilation.model, compilation[SETTINGS], compilation[CURVES]
    targets, found = dict(compilation[TARGETS]), compilation[GROUPS]
    free = [path for path in targets if is_free(path, model.get_submodule(path), settings)]
    if not free:
        raise InputError("budget chooses ratios, and no layer has a free one: give fewer in overrides, or ignore less")
    unknown = [path for path in free if path not in curves]
    if unknown:
        raise InputError(
            f"budget needs every layer in a traced part of the model that runs in eval mode, and {unknown[0]!r} is in "
            f"none, or reads nothing there ({len(unknown)} such layers): give them a ratio in overrides, or ignore them"
        )
    return Allotment(targets, {path: found[path] for path in free}, {path: curves[path] for path in free})


def is_free(path: str, layer: nn.Module, settings: Settings) -> bool:
    """Whether nothing but the general ratio decides about a target."""
    low, high = (target_of(path, layer, replace(settings, ratio=ratio)).ratio for ratio in (0.0, 0.5))
    return low != high


def trial(compilation: Compilation, targets: dict[str, Target]) -> nn.Module:
    """The model that targets lead to, without its weights solved again."""
    known: Facts = {TARGETS: targets, REASONS: compilation[REASONS], GROUPS: compilation[GROUPS]}
    plans = run_passes((Pruning(),), Compilation(compilation.model, known))[PLANS]
    return lowered_copy(compilation.model, compilation[SETTINGS], plans)
