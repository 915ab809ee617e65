"""What `sgfx.report` returns: layers and totals as plain data, and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from passes.freezing import Decisions, Timing


@dataclass(frozen=True)
class LayerReport:
    """One layer, dense and small.

    Attributes:
        path: module path.
        kind: the dense layer's class.
        groups: groups found; 0 if the layer was left alone.
        block_sizes: for each group, its filters and the inputs it reads.
        requested_ratio, achieved_ratio: share of connections pruned (the paper's eq. 13); 0 if it was left alone.
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
        params_dense, params, macs_dense, macs: totals over the whole model; MACs are those of convolutions and of
            matrix products, attention's included.
        connections_removed: share of the regrouped layers' connections.
        params_removed, macs_removed: shares of the totals above.
        filters_eliminated, params_eliminated, macs_eliminated: what elimination saved beyond the ratios.
        decisions: of a frozen model, how it is run and on what machine that was measured; else None.
        timing: of a model made for a budget of milliseconds, what these were; else None.
        counting: which MACs were not counted by fvcore, as others of the field are, and why; "" if all were.
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
    timing: Timing | None = None
    counting: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: dicts, lists, numbers and strings, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The report as a table for the terminal."""
        from tabulate import tabulate

        timed = self.decisions is not None
        head = {"layer": "left"} | dict.fromkeys(
            ("groups", "filters", "inputs", "asked", "pruned", "params", "MACs"), "right"
        )
        if timed:
            head |= {"ms dense": "right", "ms": "right", "GMAC/s": "right", "run by": "left"}
        head["left alone because"] = "left"
        rows = [_row(layer, timed) for layer in self.layers]
        table = tabulate(rows, list(head), colalign=list(head.values()), disable_numparse=True)
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
        if self.timing is not None:
            lines.append(str(self.timing))
        if self.counting:
            lines.append(self.counting)
        if self.decisions is not None:
            lines.append(self.decisions.summary())
        return "\n\n".join(lines)


def _row(layer: LayerReport, timed: bool) -> list[str]:
    filters = [size for size, _ in layer.block_sizes]
    inputs = [size for _, size in layer.block_sizes]
    grouped = layer.reason is None
    row = [
        layer.path,
        str(layer.groups) if grouped else "",
        _span(filters),
        _span(inputs),
        _percent(layer.requested_ratio) if grouped else "",
        _percent(layer.achieved_ratio) if grouped else "",
        f"{short(layer.params_dense)} → {short(layer.params)}" if grouped else short(layer.params),
        f"{short(layer.macs_dense)} → {short(layer.macs)}" if grouped else short(layer.macs),
    ]
    if timed:
        row += ["" if ms is None else f"{ms:.3f}" for ms in (layer.ms_dense, layer.ms)]
        row += ["" if layer.gmacs_per_second is None else f"{layer.gmacs_per_second:.1f}", layer.way]
    return [*row, layer.reason or ""]


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
