"""A budget of milliseconds: those of the frozen model, on this machine.

1. Models with one ratio in all free layers are frozen, at a few ratios. What was chosen for a layer took so long there:
   that is its time curve. More that is pruned takes no longer; where it was measured to, the time of less counts.
2. The whole takes another time than its layers, timed one by one. So the layers may take together what those of an even
   model take that takes the budget as a whole.
3. The model that comes out is frozen and measured, and what the layers may take is changed by what it is off, as long
   as that brings it nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from passes.calibration.budget.allocation import KNOTS, achieved
from passes.calibration.budget.allotment import Allotment, Budget, Costs, Fit, trial
from passes.calibration.budget.error_curves import GRID
from passes.errors import InputError
from passes.freezing.choosing.decisions import attach_decisions
from passes.freezing.choosing.stopwatch import Stopwatch
from passes.freezing.timing import Timing, attach_timing
from passes.infra.compilation import Compilation
from passes.options.settings import SETTINGS

LEVELS = (0.0, 0.5, 0.8, GRID[-1])  # ratios of the even models
TRIALS = 4  # of limits
NEAR, MET = 0.03, 0.1  # of the budget: not tried any nearer, and not accepted any further
PATIENCE = 4.0  # the whole is timed so many times as long as a layer

Freeze = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class TimeBudget(Budget):
    """The milliseconds that a model's frozen form may take, for the example inputs of the settings.

    Attributes:
        ms: of one call.
        freeze: makes the inference form of a model, which has ``decisions``.
    """

    ms: float
    freeze: Freeze

    def costs(self, compilation: Compilation, allotment: Allotment) -> Costs:
        """Freeze even models, and take the times of their layers."""
        inputs = compilation[SETTINGS].example_inputs or ()
        found = [_timed(trial(compilation, allotment.evenly(ratio)), inputs, self.freeze) for ratio in LEVELS]
        least = min(each.whole for each in found)
        if self.ms < least:
            raise InputError(_refusal(self.ms, least))
        ratios = {path: [achieved(each, ratio) for ratio in LEVELS] for path, each in allotment.groups.items()}
        curves = {
            path: np.interp(KNOTS, met, np.minimum.accumulate([each.layers.get(path, 0.0) for each in found]))
            for path, met in ratios.items()
        }
        wholes = np.minimum.accumulate([each.whole for each in found])
        sums = np.sum([np.interp(ratios[path], KNOTS, curve) for path, curve in curves.items()], 0)
        scale = _Scale(tuple(map(float, wholes)), tuple(map(float, sums)))
        limit = scale.limit(self.ms)
        return _Timed(curves, limit, _refusal(self.ms, least), self.ms, scale, inputs, self.freeze)


@dataclass(frozen=True)
class _Scale:
    """What the free layers of the even models took, one by one and added up, beside what the wholes took."""

    wholes: Sequence[float]
    sums: Sequence[float]

    def within(self, whole: float) -> float:
        """The time of a whole, or what comes nearest to it."""
        return min(max(whole, self.wholes[-1]), self.wholes[0])

    def limit(self, whole: float) -> float:
        """What the free layers may take together, for a whole that takes so long."""
        return float(np.interp(whole, self.wholes[::-1], self.sums[::-1]))


@dataclass(frozen=True)
class _Timed(Costs):
    """Time curves, and what is needed to measure a whole.

    Attributes:
        asked: the milliseconds that the whole may take.
        scale: leads from these to a limit.
        inputs: what the whole is called with.
        freeze: see `TimeBudget`.
    """

    asked: float
    scale: _Scale
    inputs: tuple[object, ...]
    freeze: Freeze

    def fit(self, trial_at: Callable[[float], nn.Module]) -> Fit:
        """Measure the model at the limit, and aim at less or more than what was asked for by what it is off.

        Raises:
            InputError: what comes nearest takes too long.
        """
        aim, tried = self.scale.within(self.asked), list[tuple[float, Fit, Timing]]()
        for _ in range(TRIALS):
            limit = self.scale.limit(aim)
            model = trial_at(limit)
            found = _timed(model, self.inputs, self.freeze)
            timing = Timing(self.asked, aim, found.whole, found.machine, found.noisy)
            attach_timing(model, timing)
            tried.append((abs(found.whole / self.asked - 1), Fit(limit, model=model), timing))
            again = self.scale.within(aim * self.asked / found.whole)
            pays = len(tried) == 1 or tried[-1][0] < tried[-2][0]
            if tried[-1][0] <= NEAR or again == aim or not pays:
                break
            aim = again
        off, fit, timing = min(tried, key=lambda each: each[0])
        if timing.measured > self.asked * (1 + MET):
            least = min(self.scale.wholes[-1], *(each.measured for _, _, each in tried))
            raise InputError(_refusal(self.asked, least, timing))
        pruned = timing.predicted < self.scale.wholes[0]
        missed = f"by {100 * off:.0f} %: the frozen model takes {timing.measured:.3g} ms, and more pruned than needed"
        return replace(fit, missed=missed if pruned and off > MET else "")


@dataclass(frozen=True)
class _Times:
    """Milliseconds of a frozen model.

    Attributes:
        whole: of a call.
        layers: of what was chosen for each layer, by path, all its calls.
        machine: that it was measured on.
        noisy: whether the machine was busy.
    """

    whole: float
    layers: dict[str, float]
    machine: str
    noisy: bool


def _timed(model: nn.Module, inputs: tuple[object, ...], freeze: Freeze) -> _Times:
    """Freeze a model, which keeps the decisions, and time the whole and its layers."""
    attach_decisions(model, None)  # those that came with the dense model are of another
    try:
        frozen = freeze(model)
    except InputError as error:
        raise InputError(f"budget['ms'] is a time of the frozen model, and can't be had: {error}") from error
    stopwatch, layers = Stopwatch(), dict[str, float]()
    with torch.no_grad():
        whole = stopwatch.race({"frozen": partial(frozen, *inputs)}, patience=PATIENCE)["frozen"]
    for name, layer in frozen.decisions.layers.items():
        path = name.partition("#")[0]
        layers[path] = layers.get(path, 0.0) + (layer.ms or 0.0)
    return _Times(whole, layers, frozen.decisions.machine, stopwatch.is_noisy)


def _refusal(asked: float, least: float, timing: Timing | None = None) -> str:
    """What is said where a model can't be so fast."""
    nearest = f" what comes nearest takes {timing.measured:.3g} ms, and" if timing is not None else ""
    busy = "; the machine was busy: try again when it is quiet" if timing is not None and timing.noisy else ""
    return (
        f"budget of {asked:.3g} ms can't be met on this machine:{nearest} the least that was measured is {least:.3g} "
        f"ms, with ratios of up to {LEVELS[-1]}; raise the budget, or ignore less{busy}"
    )
