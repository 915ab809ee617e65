"""What a frozen model is made of, for reports: each layer's plan, what is left of it, how it is run, how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.freezing import Decisions, LayerDecision, chosen_layers, filters_of
from passes.layers import LayerPlan, layer_shape, plan_of


@dataclass(frozen=True)
class FrozenLayer:
    """One layer of a frozen model.

    Attributes:
        plan: its plan, in the numbering of the dense layer.
        params: weights that are kept, and a bias for each filter, norms included.
        weights: the weights alone.
        planned: what the plan alone would leave of them.
        filters: filters that are left.
        way: how it is run, as its decision says; "" if it is not part of a frozen graph.
        ms_dense, ms: milliseconds of the library with the dense weight and of what was chosen; None if not measured.
        gmacs_per_second: of what was chosen, as measured; or None.
    """

    plan: LayerPlan
    params: int
    weights: int
    planned: int
    filters: int
    way: str = ""
    ms_dense: float | None = None
    ms: float | None = None
    gmacs_per_second: float | None = None


def decisions_in(model: nn.Module) -> Decisions | None:
    """The decisions by which a frozen model is run; None if it is not frozen."""
    found = getattr(model, "decisions", None)
    return found if isinstance(found, Decisions) else None


def is_frozen(model: nn.Module) -> bool:
    """Whether a model is frozen, or has a part that is."""
    return any(decisions_in(module) is not None for module in model.modules())


def frozen_layers(dense: nn.Module, frozen: nn.Module, decisions: Decisions) -> dict[str, FrozenLayer]:
    """The convolutions and linear layers of `dense` in its frozen form, by module path.

    Raises:
        InputError: `frozen` was not made from a form of `dense`.
    """
    modules = dict(dense.named_modules())
    chosen: dict[str, list[Any]] = {}
    for layer in chosen_layers(frozen).values():
        chosen.setdefault(layer.path.partition("#")[0], []).append(layer)
    for path, calls in chosen.items():
        _check(path, modules.get(path), calls[0])
    others = dict(frozen.named_modules())
    return {
        path: _frozen(layer, chosen[path], decisions.layers) if path in chosen else _as_it_was(layer, others.get(path))
        for path, layer in modules.items()
        if isinstance(layer, _ConvNd | nn.Linear)
    }


def _check(path: str, layer: Any, frozen: Any) -> None:
    plan = plan_of(frozen)
    known = isinstance(layer, _ConvNd | nn.Linear)
    fits = known and (layer_shape(layer) == plan.shape if plan else layer.weight.numel() == frozen.kept_weights)
    if not fits:
        raise InputError(f"small is no frozen form of dense: layer {path!r} of small is not in dense, or differs")


def _frozen(layer: Any, calls: list[Any], decided: Mapping[str, LayerDecision]) -> FrozenLayer:
    """A layer by all of its calls."""
    plan = plan_of(calls[0]) or LayerPlan.of(layer, reason="dense")
    made = [decided[each.path] for each in calls]
    times = [each.ms for each in made if each.ms is not None]
    library = [each.ms_library for each in made if each.ms_library is not None]
    measured = len(times) == len(made) and sum(times) > 0
    filters = filters_of(calls[0])
    return FrozenLayer(
        plan=plan,
        params=calls[0].kept_weights + (filters if calls[0].bias is not None else 0),
        weights=calls[0].kept_weights,
        planned=plan.connections * math.prod(plan.kernel_size) if plan.grouped else layer.weight.numel(),
        filters=filters,
        way=", ".join(dict.fromkeys(each.name for each in made)),
        ms_dense=sum(library) if len(library) == len(made) else None,
        ms=sum(times) if measured else None,
        gmacs_per_second=sum(each.macs for each in made) / sum(times) / 1e6 if measured else None,
    )


def _as_it_was(layer: nn.Module, now: nn.Module | None) -> FrozenLayer:
    """A layer that is in no frozen graph: called by code that can't be traced, of another kind, or only in training."""
    plan = (plan_of(now) if now is not None else None) or LayerPlan.of(layer, reason="not frozen")
    count = sum(parameter.numel() for parameter in now.parameters()) if now is not None else 0
    return FrozenLayer(plan, count, count, count, plan.out_channels)


def frozen_params(frozen: nn.Module, layers: Mapping[str, FrozenLayer]) -> int:
    """What a frozen model holds: the weights and biases of its layers, and the parameters of all else."""
    rest = sum(parameter.numel() for parameter in frozen.parameters())
    return rest + sum(layer.params for layer in layers.values() if layer.way)
