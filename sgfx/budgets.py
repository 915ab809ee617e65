"""Budgets of `sgfx.compile`: from a share of the network's total to a ratio for each layer, in one walk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from passes.budgeting import Curve, allocate, error_curve
from passes.calibration import sample_at, surroundings_at
from passes.copying import shadow
from passes.errors import InputError
from passes.lowering import lower
from passes.plan import LayerPlan
from passes.random_state import preserved_random_state
from passes.selection import target_of
from passes.tandem import Walk
from passes.trace import join
from passes.unit import Unit
from sgfx.calibration import walkable_regions
from sgfx.counting import count_macs

MEASURES = ("macs", "params")
Budget = Mapping[str, float]


def checked_budget(budget: object) -> tuple[str, float]:
    """Check a budget, ``{"macs": share}`` or ``{"params": share}``, and return what it counts and the share."""
    if not isinstance(budget, Mapping):
        raise TypeError(f"budget must be {{'macs': share}} or {{'params': share}}, not {budget!r}")
    if len(budget) != 1 or next(iter(budget)) not in MEASURES:
        raise InputError(
            f"budget must have exactly one of the keys 'macs' and 'params', not {sorted(map(str, budget))}"
        )
    ((measure, share),) = budget.items()
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"budget[{measure!r}] must be a number in (0, 1], not {share!r}")
    if not 0 < float(share) <= 1:
        raise InputError(f"budget[{measure!r}] is the share that remains and must lie in (0, 1], not {share}")
    return measure, float(share)


def spend(unit: Unit, budget: tuple[str, float], batches: list[Any]) -> None:
    """Set the ratios of the unit's targets so that the budget is kept at the least error on the calibration data.

    Targets to which an override or ``linear_ratio`` gives a ratio keep it.

    Args:
        unit: a model that is analysed and grouped, but not pruned yet.
        budget: what is counted, and the share of the model's total that remains.
        batches: inputs of the model.

    Raises:
        InputError: the layers whose ratios are free can't bring the total down that far, or can't be measured.
    """
    measure, share = budget
    curves = _curves(unit, batches)
    total, costs = _costs(unit, measure, batches)
    free = [path for path in unit.targets if _is_free(unit, path)]
    unknown = [path for path in free if path not in curves]
    if unknown:
        raise InputError(
            f"budget needs every layer in a traced part of the model that runs in eval mode, and {unknown[0]!r} is in "
            f"none ({len(unknown)} such layers): give them a ratio in overrides, or ignore them"
        )
    fixed = sum(costs[path] * (1 - unit.targets[path].ratio) for path in unit.targets if path not in free)
    rest = total - sum(costs.values()) + fixed
    ratios = allocate([curves[path] for path in free], [costs[path] for path in free], share * total - rest)
    if ratios is None:
        raise InputError(
            f"budget of {share:.3g} of all {measure} can't be kept: what is left alone or has a fixed ratio is "
            f"{rest / total:.3g} of them, and every other layer keeps something; raise the budget, or ignore less"
        )
    for path, ratio in zip(free, ratios, strict=True):
        unit.targets[path] = replace(unit.targets[path], ratio=ratio)


def _is_free(unit: Unit, path: str) -> bool:
    """Whether nothing but the general ratio decides about a target."""
    layer = unit.model.get_submodule(path)
    low, high = (target_of(path, layer, replace(unit.settings, ratio=ratio)).ratio for ratio in (0.0, 0.5))
    return low != high


def _costs(unit: Unit, measure: str, batches: list[Any]) -> tuple[float, dict[str, float]]:
    """The model's total, and what the connections of each target cost with nothing pruned."""
    if measure == "params":
        layers = {path: unit.model.get_submodule(path) for path in unit.targets}
        costs = {path: float(layer.get_parameter("weight").numel()) for path, layer in layers.items()}
        return float(sum(parameter.numel() for parameter in unit.model.parameters())), costs
    counts = count_macs(unit.model, unit.settings.example_inputs or (batches[0],))
    return float(counts[""]), {path: float(counts[path]) for path in unit.targets}


def _curves(unit: Unit, batches: list[Any]) -> dict[str, Curve]:
    """The error curve of each target, on the walk of the dense model beside itself."""
    dense = shadow(unit.model).eval()
    whole = copy.deepcopy(dense)
    lower(whole, {path: _whole(unit.model.get_submodule(path)) for path in unit.targets})
    curves: dict[str, Curve] = {}
    with preserved_random_state(), torch.no_grad():
        for path, theirs, mine, pairs in walkable_regions(dense, whole, batches, unit.settings.leaf_modules):
            walk = Walk(theirs, mine, pairs)
            for stop in walk.stops():
                name = join(path, str(stop.target))
                sample = sample_at(walk, stop, surroundings_at(walk, stop))
                curves[name] = error_curve(walk.module(stop), sample, unit.grouping[name])
    return curves


def _whole(layer: nn.Module) -> LayerPlan:
    """The plan of a layer as one group that reads all inputs: as fast as the dense layer, and a stop of the walk."""
    out_channels, in_channels = layer.get_parameter("weight").shape[:2]
    labels, keep = torch.zeros(out_channels, dtype=torch.long), torch.ones(1, in_channels, dtype=torch.bool)
    return LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=0.0)
