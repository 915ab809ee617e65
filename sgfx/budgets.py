"""Budgets of `sgfx.compile`: how they are given, what they count, and what is said where one is missed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from passes.calibration import Arguments, Budget, Fit, ShareBudget
from passes.errors import InputError
from passes.freezing import TimeBudget, timing_of
from passes.layers import is_layer
from passes.options import checked_number, meant_as_share
from sgfx.freezing import freeze
from sgfx.reporting.counting import count_macs

SHARES, TIME = ("macs", "params"), "ms"
Asked = Mapping[str, float]


def checked_budget(budget: object) -> tuple[str, float]:
    """Check ``{"macs": share}``, ``{"params": share}`` or ``{"ms": milliseconds}``; return the key and the number."""
    if not isinstance(budget, Mapping):
        raise TypeError(
            f"budget must be {{'macs': share}}, {{'params': share}} or {{'ms': milliseconds}}, not {budget!r}"
        )
    if len(budget) != 1 or next(iter(budget)) not in (*SHARES, TIME):
        raise InputError(
            f"budget must have exactly one of the keys 'macs', 'params' and 'ms', not {sorted(map(str, budget))}"
        )
    ((measure, share),) = budget.items()
    if measure == TIME:
        return measure, checked_number(share, "budget['ms']", above=0)
    said = f": it is the share that remains{meant_as_share(share)}"
    return measure, checked_number(share, f"budget[{measure!r}]", above=0, most=1, hint=said)


def budget_of(measure: str, share: float, inputs: Arguments, *, eliminating: bool) -> Budget:
    """A checked budget, which counts as `sgfx.report` does, for a call with `inputs`, or takes the time of `freeze`."""
    if measure == TIME:
        return TimeBudget(share, lambda model: freeze(model, inputs))

    def macs(model: nn.Module) -> Mapping[str, float]:
        return count_macs(model, inputs)

    return ShareBudget(measure, share, count_params if measure == "params" else macs, eliminating)


def count_params(model: nn.Module) -> dict[str, float]:
    """The parameters of a model, under "", and the weights of each layer, by path."""
    layers = {path: module for path, module in model.named_modules() if is_layer(module) and path}
    weights = {path: float(layer.get_parameter("weight").numel()) for path, layer in layers.items()}
    return {"": float(sum(parameter.numel() for parameter in model.parameters())), **weights}


def warn_of_fit(fit: Fit) -> None:
    """Say how a budget is missed, if it is, and whether it was measured on a busy machine."""
    if fit.missed:
        warnings.warn(f"the budget is missed {fit.missed}", stacklevel=5)
    timing = timing_of(fit.model) if fit.model is not None else None
    if timing is not None and timing.noisy:
        warnings.warn(
            f"the machine was busy, so that the {timing.measured:.3g} ms measured for the budget are not to be relied "
            "on: compile again when it is quiet",
            stacklevel=5,
        )
