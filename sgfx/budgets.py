"""Budgets of `sgfx.compile`: from a share of the network's total to a ratio for each layer, in one walk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real

import numpy as np
import torch
from torch import nn

from passes.calibration.budget import Curve, achieved, allocate, error_curve, settle
from passes.calibration.calibrate import overflow, sample_at, surroundings_at
from passes.calibration.data import Arguments
from passes.calibration.paired_walk import Walk
from passes.calibration.pairing import walkable_regions
from passes.compression.grouping import GROUPS
from passes.compression.lowering import lower
from passes.compression.selection import TARGETS, Target, target_of
from passes.errors import InputError
from passes.infra.compilation import Compilation
from passes.infra.random_state import own_random_state
from passes.layers.plan import LayerPlan
from passes.models.copying import unhooked_copy
from passes.options.ranges import meant_as_share
from passes.options.settings import SETTINGS, Settings
from sgfx.progress import progress_bar
from sgfx.reporting.counting import count_macs

MEASURES = ("macs", "params")
Budget = Mapping[str, float]
TRIALS = 12  # of limits, where elimination takes away more than the ratios say
SCANNED = 33  # limits, where that ends further than `WORST` from the budget
TOLERANCE, WORST = 2e-3, 1e-2  # of the model's total
PARTS = (1.0, 0.5, 0.0)  # of the way from one ratio for all layers to those of the error curves


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
        raise InputError(
            f"budget[{measure!r}] is the share that remains and must lie in (0, 1], not {share}{meant_as_share(share)}"
        )
    return measure, float(share)


def spend(
    grouped: Compilation,
    budget: tuple[str, float],
    batches: list[Arguments],
    judge: Callable[[dict[str, Target]], float],
    made: Callable[[dict[str, Target]], nn.Module] | None = None,
) -> dict[str, Target]:
    """Return targets with ratios that keep the budget at the least error on the calibration data.

    Error curves see each layer by itself. So ratios half-way to one for all layers, and that one, which cost as much,
    are tried too, as long as the network as a whole gets better. Targets to which an override or ``linear_ratio`` gives
    a ratio keep it.

    Args:
        grouped: a model that is analysed and grouped, but not pruned yet.
        budget: what is counted, and the share of the model's total that remains.
        batches: arguments of the model.
        judge: the error of the network that targets lead to, on data that it was not fitted to; NaN where there are
            none, or outputs can't be compared: the ratios of the curves stay.
        made: makes the model that targets lead to, where that is smaller than they say, since filters that nobody
            reads are removed: the ratios are lowered until it meets the budget.

    Raises:
        InputError: the layers whose ratios are free can't bring the total down that far, or can't be measured.
    """
    measure, share = budget
    curves = _curves(grouped, batches)
    found, settings = grouped[GROUPS], grouped[SETTINGS]
    targets: dict[str, Target] = dict(grouped[TARGETS].items())
    inputs = settings.example_inputs or batches[0]
    total, costs = _costs(grouped.model, targets, measure, inputs)
    free = [path for path in targets if _is_free(path, grouped.model.get_submodule(path), settings)]
    unknown = [path for path in free if path not in curves]
    if unknown:
        raise InputError(
            f"budget needs every layer in a traced part of the model that runs in eval mode, and {unknown[0]!r} is in "
            f"none, or reads nothing there ({len(unknown)} such layers): give them a ratio in overrides, or ignore them"
        )
    pruned = {path: achieved(found[path], targets[path].ratio) for path in targets if path not in free}
    rest = total - sum(costs.values()) + sum(costs[path] * (1 - ratio) for path, ratio in pruned.items())
    groups, prices = [found[path] for path in free], [costs[path] for path in free]

    def allot(limit: float, part: float = 1.0) -> bool:
        """Give the free layers the ratios at which they cost `limit` together; False if they can't cost so little."""
        ratios = allocate([curves[path] for path in free], prices, limit)
        if ratios is None:
            return False
        even = 1 - min(1.0, limit / max(sum(prices), 1.0))
        wished = [even + part * (ratio - even) for ratio in ratios]
        for path, ratio in zip(free, settle(wished, groups, prices, limit), strict=True):
            targets[path] = replace(targets[path], ratio=ratio)
        return True

    limit = share * total - rest
    if not allot(limit):
        raise InputError(
            f"budget of {share:.3g} of all {measure} can't be kept: what is left alone or has a fixed ratio is "
            f"{rest / total:.3g} of them, and every other layer keeps something; raise the budget, or ignore less"
        )
    part = _best_part(partial(allot, limit), partial(judge, targets))
    if made is not None:
        _raise_limit(
            partial(allot, part=part),
            limit,
            sum(prices),
            lambda: _count(made(targets), measure, inputs) / total - share,
        )
    return targets


def _best_part(allot: Callable[[float], object], judge: Callable[[], float]) -> float:
    """The part of `PARTS` after whose allotment the judge finds the least error; ends where it grows."""
    best, least = PARTS[0], np.inf
    for part in PARTS:
        allot(part)
        found = judge()
        if not found < least:
            break
        best, least = part, found
    allot(best)
    return best


def _raise_limit(allot: Callable[[float], object], low: float, high: float, over: Callable[[], float]) -> None:
    """Allot a limit between `low` and `high` after which the model is as little `over` its share as can be found."""
    tried: list[tuple[float, float]] = []
    most = high
    for _ in range(TRIALS):
        limit = low if not tried else (low + high) / 2
        allot(limit)
        missed = over()
        tried.append((abs(missed), limit))
        if abs(missed) < TOLERANCE:
            return
        low, high = (limit, high) if missed < 0 else (low, limit)
    if min(tried)[0] > WORST:  # small networks: what elimination takes away jumps up and down with the limit
        for limit in np.linspace(tried[0][1], most, SCANNED):
            allot(float(limit))
            tried.append((abs(over()), float(limit)))
    missed, limit = min(tried)
    allot(limit)
    if missed > WORST:
        warnings.warn(
            f"the budget is missed by {100 * missed:.1f} % of the total: what elimination takes away leaves no ratios "
            "that come nearer",
            stacklevel=5,
        )


def _is_free(path: str, layer: nn.Module, settings: Settings) -> bool:
    """Whether nothing but the general ratio decides about a target."""
    low, high = (target_of(path, layer, replace(settings, ratio=ratio)).ratio for ratio in (0.0, 0.5))
    return low != high


def _costs(model: nn.Module, targets: Iterable[str], measure: str, inputs: Arguments) -> tuple[float, dict[str, float]]:
    """The model's total, and what the connections of each target cost with nothing pruned."""
    if measure == "params":
        weights = {path: model.get_submodule(path).get_parameter("weight") for path in targets}
        return _count(model, measure, inputs), {path: float(weight.numel()) for path, weight in weights.items()}
    counts = count_macs(model, inputs)
    return float(counts[""]), {path: float(counts[path]) for path in targets}


def _count(model: nn.Module, measure: str, inputs: Arguments) -> float:
    """The total of a model."""
    if measure == "params":
        return float(sum(parameter.numel() for parameter in model.parameters()))
    return float(count_macs(model, inputs)[""])


def _curves(grouped: Compilation, batches: list[Arguments]) -> dict[str, Curve]:
    """The error curve of each target, on the walk of the dense model beside itself."""
    model, targets, leaves = grouped.model, grouped[TARGETS], grouped[SETTINGS].leaf_modules
    whole = unhooked_copy(model).eval()
    lower(whole, {path: _whole(model.get_submodule(path)) for path in targets})
    curves: dict[str, Curve] = {}
    bar = progress_bar("budget", len(targets), "layer")
    with own_random_state(), torch.no_grad(), bar as tick:
        for path, theirs, mine, pairs in walkable_regions(model, whole, batches, leaves):
            walk = Walk(theirs, mine, pairs, path)
            for stop in walk.stops():
                name = walk.name(stop)
                sample = sample_at(walk, stop, surroundings_at(walk, stop))
                tick()
                if not len(sample.wanted):
                    continue
                curves[name] = error_curve(walk.module(stop), sample, grouped[GROUPS][name])
                if not np.isfinite(curves[name]).all():
                    raise overflow(name)
    return curves


def _whole(layer: nn.Module) -> LayerPlan:
    """The plan of a layer as one group that reads all inputs: as fast as the dense layer, and a stop of the walk."""
    out_channels, in_channels = layer.get_parameter("weight").shape[:2]
    labels, keep = torch.zeros(out_channels, dtype=torch.long), torch.ones(1, in_channels, dtype=torch.bool)
    return LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=0.0)
