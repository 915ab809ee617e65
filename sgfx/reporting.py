"""`sgfx.report`: what became of each layer, and what was asked for beside what was achieved.

How MACs are counted stands in `sgfx.counting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.cut import cuts
from passes.errors import InputError
from passes.freezing.decisions import Decisions
from passes.plan import LayerPlan, layer_shape, plans
from passes.settings import as_inputs, check_model
from sgfx.counting import count_macs
from sgfx.frozen import FrozenLayer, decisions_in, frozen_layers, frozen_params


@dataclass(frozen=True)
class LayerReport:
    """One layer, dense and small.

    Attributes:
        path: module path.
        kind: the dense layer's class.
        groups: groups found; 0 if the layer was left alone.
        block_sizes: for each group, its filters and the inputs it reads.
        requested_ratio, achieved_ratio: share of connections pruned (eq. 13); 0 if the layer was left alone.
        params_dense, params: parameters, bias included.
        macs_dense, macs: multiply-adds for the example inputs.
        reason: why the layer was left alone, or None.
        way: of a frozen model, how the layer is run, as `Decisions` names it; else "".
        ms_dense, ms: milliseconds that `freeze` measured for the library with the dense weight, and for what it chose;
            None where nothing was measured.
        gmacs_per_second: the rate of what was chosen, or None.
    """

    path: str
    kind: str
    groups: int
    block_sizes: list[tuple[int, int]]
    requested_ratio: float
    achieved_ratio: float
    params_dense: int
    params: int
    macs_dense: int
    macs: int
    reason: str | None
    way: str = ""
    ms_dense: float | None = None
    ms: float | None = None
    gmacs_per_second: float | None = None


@dataclass(frozen=True)
class Share:
    """A share removed: what was asked for, and what was achieved."""

    requested: float
    achieved: float


@dataclass(frozen=True)
class Report:
    """What `sgfx.report` returns: print it, or take plain data from `to_dict`.

    Attributes:
        layers: one entry for each convolution and linear layer, in the order of ``named_modules()``.
        params_dense, params, macs_dense, macs: totals over the whole model.
        connections_removed: share of the regrouped layers' connections.
        params_removed, macs_removed: shares of the totals above.
        filters_eliminated, params_eliminated, macs_eliminated: what elimination saved beyond the ratios.
        decisions: of a frozen model, how it is run and on what machine that was measured; else None.
    """

    layers: tuple[LayerReport, ...]
    params_dense: int
    params: int
    macs_dense: int
    macs: int
    connections_removed: Share
    params_removed: Share
    macs_removed: Share
    filters_eliminated: int
    params_eliminated: int
    macs_eliminated: int
    decisions: Decisions | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: dicts, lists, numbers and strings, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The report as a table for the terminal."""
        from tabulate import tabulate

        timed = self.decisions is not None
        head = ["layer", "groups", "filters", "inputs", "asked", "pruned", "params", "MACs"]
        head += ["ms dense", "ms", "GMAC/s", "run by"] * timed + ["left alone because"]
        table = tabulate(
            [_row(layer, timed) for layer in self.layers],
            head,
            colalign=["left"] + ["right"] * (7 + 3 * timed) + ["left"] * (1 + timed),
            disable_numparse=True,
        )
        shares = {
            "connections": self.connections_removed,
            "parameters": self.params_removed,
            "MACs": self.macs_removed,
        }
        counts = {
            "connections": ["", ""],
            "parameters": [short(self.params_dense), short(self.params)],
            "MACs": [short(self.macs_dense), short(self.macs)],
        }
        totals = [
            [name, *counts[name], _percent(share.requested), _percent(share.achieved)] for name, share in shares.items()
        ]
        below = ["removed", "dense", "small", "asked", "achieved"]
        lines = [table, tabulate(totals, below, colalign=["left"] + ["right"] * 4)]
        if self.filters_eliminated:
            lines.append(
                f"eliminated beyond the ratios: {self.filters_eliminated} filters that nobody reads, "
                f"{short(self.params_eliminated)} parameters, {short(self.macs_eliminated)} MACs"
            )
        if self.decisions is not None:
            lines.append(self.decisions.summary())
        return "\n\n".join(lines)


def report(dense: nn.Module, small: nn.Module, example_inputs: Tensor | tuple[object, ...]) -> Report:
    """Compare a compiled model with the dense one it was made from.

    Args:
        dense: the model before `sgfx.compile`. Neither model is changed.
        small: what `sgfx.compile` or `Pruner.lower` returned, or a masked model (which computes as much as `dense`), or
            what `sgfx.freeze` made of one of these or of `dense`.
        example_inputs: a tensor or a tuple of positional arguments; MACs are counted for these.

    Raises:
        InputError: `small` was not compiled, is no compiled form of `dense`, or the inputs do not fit.
    """
    check_model(dense)
    check_model(small)
    inputs = as_inputs(example_inputs) or ()
    if (decisions := decisions_in(small)) is not None:
        frozen = frozen_layers(dense, small, decisions)
        params = {"": frozen_params(small, frozen)} | {path: layer.params for path, layer in frozen.items()}
        plain = _assemble(dense, {path: layer.plan for path, layer in frozen.items()}, params, small, inputs)
        return _timed(plain, frozen, decisions)
    found = plans_of_pair(dense, small)
    params = {path: _parameters(module) for path, module in small.named_modules()}
    plain = _assemble(dense, found, params, small, inputs)
    filters, params_saved, macs = _eliminated(dense, small, plain.layers, found)
    return replace(plain, filters_eliminated=filters, params_eliminated=params_saved, macs_eliminated=macs)


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
    before, after = count_macs(dense, inputs), count_macs(small, inputs)
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
    )


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


def _row(layer: LayerReport, timed: bool) -> list[str]:
    filters = [size for size, _ in layer.block_sizes]
    inputs = [size for _, size in layer.block_sizes]
    grouped = layer.reason is None
    return [
        layer.path,
        str(layer.groups) if grouped else "",
        _span(filters),
        _span(inputs),
        _percent(layer.requested_ratio) if grouped else "",
        _percent(layer.achieved_ratio) if grouped else "",
        f"{short(layer.params_dense)} → {short(layer.params)}" if grouped else short(layer.params),
        f"{short(layer.macs_dense)} → {short(layer.macs)}" if grouped else short(layer.macs),
        *[f"{ms:.3f}" if ms is not None else "" for ms in (layer.ms_dense, layer.ms)] * timed,
        *["" if layer.gmacs_per_second is None else f"{layer.gmacs_per_second:.1f}", layer.way] * timed,
        layer.reason or "",
    ]


def _span(sizes: list[int]) -> str:
    return f"{min(sizes)}–{max(sizes)}" if sizes else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def short(count: int) -> str:
    """A count with three significant digits and its unit.

    >>> short(999), short(25_557_032), short(4_089_184_256)
    ('999', '25.6M', '4.09G')
    """
    if count < 1000:
        return str(count)
    power = min(int(math.log10(count)) // 3, 4)
    value = count / 1000**power
    return f"{value:.{2 - int(math.log10(value))}f}{' KMGT'[power]}"
