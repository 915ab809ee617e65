"""Budgets of `sgfx.compile`: how they are given, what they count, and what is said where one is missed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from passes.calibration import Arguments, Budget
from passes.errors import InputError
from passes.layers import is_layer
from passes.options import checked_number, meant_as_share
from sgfx.reporting.counting import count_macs

MEASURES = ("macs", "params")
Shares = Mapping[str, float]


def checked_budget(budget: object) -> tuple[str, float]:
    """Check a budget, ``{"macs": share}`` or ``{"params": share}``, and return what it counts and the share."""
    if not isinstance(budget, Mapping):
        raise TypeError(f"budget must be {{'macs': share}} or {{'params': share}}, not {budget!r}")
    if len(budget) != 1 or next(iter(budget)) not in MEASURES:
        raise InputError(
            f"budget must have exactly one of the keys 'macs' and 'params', not {sorted(map(str, budget))}"
        )
    ((measure, share),) = budget.items()
    said = f": it is the share that remains{meant_as_share(share)}"
    return measure, checked_number(share, f"budget[{measure!r}]", above=0, most=1, hint=said)


def budget_of(measure: str, share: float, inputs: Arguments, *, eliminating: bool) -> Budget:
    """A checked budget, which counts as `sgfx.report` does, for a call with `inputs`."""

    def macs(model: nn.Module) -> Mapping[str, float]:
        return count_macs(model, inputs)

    return Budget(measure, share, count_params if measure == "params" else macs, eliminating)


def count_params(model: nn.Module) -> dict[str, float]:
    """The parameters of a model, under "", and the weights of each layer, by path."""
    layers = {path: module for path, module in model.named_modules() if is_layer(module) and path}
    weights = {path: float(layer.get_parameter("weight").numel()) for path, layer in layers.items()}
    return {"": float(sum(parameter.numel() for parameter in model.parameters())), **weights}


def warn_of_missed(missed: float) -> None:
    """Say that a budget is missed by a share of the total, if it is."""
    if missed > 0:
        warnings.warn(
            f"the budget is missed by {100 * missed:.1f} % of the total: what elimination takes away leaves no ratios "
            "that come nearer",
            stacklevel=5,
        )
