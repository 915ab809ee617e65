"""`sgfx.report`: what became of each layer, and what was asked for beside what was achieved.

How MACs are counted stands in `sgfx.reporting.counting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.freezing import Decisions, timing_of
from passes.layers import LayerPlan, cuts, layer_shape, plans
from passes.options import ExampleInputs, as_inputs, check_model
from sgfx.reporting.counting import count_and_tell
from sgfx.reporting.frozen import FrozenLayer, decisions_in, frozen_layers, frozen_params
from sgfx.reporting.tables import LayerReport, Report, Share


def report(dense: nn.Module, small: nn.Module, example_inputs: ExampleInputs) -> Report:
    """Compare a compiled model with the dense one it was made from.

    Args:
        dense: the model before `sgfx.compile`. Neither model is changed.
        small: what `sgfx.compile` or `Pruner.lower` returned, or a masked model (which computes as much as `dense`), or
            what `sgfx.freeze` made of one of these or of `dense`.
        example_inputs: a tensor, a tuple of positional arguments (the last may be a dict of keywords), or such a dict;
            MACs are counted for these.

    Raises:
        InputError: `small` was not compiled, is no compiled form of `dense`, or the inputs do not fit.
    """
    check_model(dense)
    check_model(small)
    inputs = as_inputs(example_inputs, dense) or ()
    if (decisions := decisions_in(small)) is not None:
        frozen = frozen_layers(dense, small, decisions)
        params = {"": frozen_params(small, frozen)} | {path: layer.params for path, layer in frozen.items()}
        plain = _assemble(dense, {path: layer.plan for path, layer in frozen.items()}, params, small, inputs)
        return _timed(plain, frozen, decisions)
    found = plans_of_pair(dense, small)
    params = {path: _parameters(module) for path, module in small.named_modules()}
    plain = _assemble(dense, found, params, small, inputs)
    filters, params_saved, macs = _eliminated(dense, small, plain.layers, found)
    return replace(
        plain,
        filters_eliminated=filters,
        params_eliminated=params_saved,
        macs_eliminated=macs,
        timing=timing_of(small),
    )


def plans_of_pair(dense: nn.Module, small: nn.Module) -> dict[str, LayerPlan]:
    """The layer plans of `small`, checked to be those of a model made from `dense`."""
    check_model(dense)
    check_model(small)
    if decisions_in(small) is not None:
        raise InputError("small is a frozen model: give the compiled model that it was made from")
    found = plans(small)
    if not found:
        raise InputError("small has no layer plans: it must be what sgfx.compile or Pruner.lower returned")
    modules = dict(dense.named_modules())
    for path, plan in found.items():
        layer = modules.get(path)
        if not isinstance(layer, _ConvNd | nn.Linear) or layer_shape(layer) != plan.shape:
            raise InputError(f"small is no compiled form of dense: layer {path!r} of small is not in dense, or differs")
    return found


def _assemble(
    dense: nn.Module,
    found: dict[str, LayerPlan],
    params: Mapping[str, int],
    small: nn.Module,
    inputs: tuple[object, ...],
) -> Report:
    """The report without what elimination saved; `params` are those of `small` by path, "" for all."""
    (before, dense_note), (after, small_note) = count_and_tell(dense, inputs), count_and_tell(small, inputs)
    layers = tuple(
        LayerReport(
            path=path,
            kind=plan.kind,
            groups=plan.groups,
            block_sizes=plan.block_sizes,
            requested_ratio=plan.requested_ratio or 0.0,
            achieved_ratio=plan.achieved_ratio,
            params_dense=_parameters(dense.get_submodule(path)),
            params=params[path],
            macs_dense=before[path],
            macs=after[path],
            reason=plan.reason,
        )
        for path, plan in found.items()
    )
    grouped = [(layer, found[layer.path]) for layer in layers if layer.reason is None]
    all_params, macs = _parameters(dense), before[""]
    pairs = sum(plan.out_channels * plan.in_channels for _, plan in grouped)
    return Report(
        layers,
        all_params,
        params[""],
        macs,
        after[""],
        Share(
            sum(layer.requested_ratio * p.out_channels * p.in_channels for layer, p in grouped) / max(pairs, 1),
            1 - sum(plan.connections for _, plan in grouped) / max(pairs, 1),
        ),
        Share(sum(layer.requested_ratio * p.weights for layer, p in grouped) / all_params, 1 - params[""] / all_params),
        Share(
            sum(layer.requested_ratio * layer.macs_dense for layer, _ in grouped) / max(macs, 1),
            1 - after[""] / max(macs, 1),
        ),
        filters_eliminated=0,
        params_eliminated=0,
        macs_eliminated=0,
        counting=_counting(dense_note, small_note),
    )


def _counting(dense: str, small: str) -> str:
    """What is worth knowing about how MACs were counted; why fvcore could not count those of either model, or ""."""
    names = " and ".join(name for name, why in (("dense", dense), ("small", small)) if why)
    if not names:
        return ""
    return f"MACs of {names} are torch's flop counter's, since fvcore can't trace the model: {dense or small}"


def _timed(plain: Report, frozen: Mapping[str, FrozenLayer], decisions: Decisions) -> Report:
    """A report of a frozen model, with the times of its layers and what freezing took out of them."""
    layers = tuple(
        replace(layer, way=made.way, ms_dense=made.ms_dense, ms=made.ms, gmacs_per_second=made.gmacs_per_second)
        for layer, made in zip(plain.layers, frozen.values(), strict=True)
    )
    run = [(layer, frozen[layer.path]) for layer in layers if layer.way]
    return replace(
        plain,
        layers=layers,
        filters_eliminated=sum(made.plan.out_channels - made.filters for _, made in run),
        params_eliminated=sum(made.planned - made.weights for _, made in run),
        macs_eliminated=sum(round(layer.macs_dense * (1 - layer.achieved_ratio)) - layer.macs for layer, _ in run),
        decisions=decisions,
    )


def _eliminated(
    dense: nn.Module, small: nn.Module, layers: tuple[LayerReport, ...], found: dict[str, LayerPlan]
) -> tuple[int, int, int]:
    """Filters, parameters and MACs that elimination took, beyond what the plans alone take."""
    filters = params = 0
    for path, cut in cuts(small).items():
        before = dense.get_submodule(path)
        kept = found[path].connections * math.prod(found[path].kernel_size) if path in found else 0
        grouped = path in found and found[path].grouped
        planned = kept + _bias_size(before) if grouped else _parameters(before)
        params += planned - _parameters(small.get_submodule(path))
        if cut.outputs is not None and path in found:
            filters += found[path].out_channels - len(cut.outputs)
    macs = sum(
        round(layer.macs_dense * (1 - layer.achieved_ratio)) - layer.macs
        for layer in layers
        if layer.path in cuts(small) and layer.macs_dense
    )
    return filters, params, macs


def _bias_size(layer: nn.Module) -> int:
    return 0 if layer._parameters.get("bias") is None else int(layer._parameters["bias"].numel())  # type: ignore[union-attr]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
