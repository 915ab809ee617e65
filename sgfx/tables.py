"""`sgfx tables`: the Params and FLOPs columns of the paper's Tables 1 to 6, beside what the compiler yields.

Random weights suffice: sizes depend on the ratios, not on what the weights are. Parameters are counted as the paper
counts them: kept weights, two for the batch norm of each live filter, and the biases of live outputs. That leaves out
the batch norms over concatenated inputs of a DenseNet; the true count stands beside it. One multiply-add is one "FLOP".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import models_zoo
from passes.compression import GROUPS, PLANS, REASONS, TARGETS, lower
from passes.infra import Compilation, Facts, run_passes
from passes.layers import LayerPlan, is_linear, plans
from passes.models import copy_model
from passes.options import SETTINGS, checked_settings
from passes.pipeline import ANALYSIS, GROUPING, PRUNING
from sgfx.published import Table
from sgfx.reporting.counting import count_macs


@dataclass(frozen=True)
class Row:
    """One line of a table: published, compiled (counted as the paper does), and the true parameter count.

    Attributes:
        readings: of a transferred network, parameters under each reading of its head; `params` is the first.
    """

    table: int
    model: str
    conv_ratio: float
    linear_ratio: float
    published_params: float
    params: int
    published_macs: float
    macs: int
    true_params: int
    readings: dict[str, int] = field(default_factory=dict)

    @property
    def params_difference(self) -> float:
        """Compiled over published parameters, less one."""
        return self.params / self.published_params - 1

    @property
    def macs_difference(self) -> float:
        """Compiled over published MACs, less one."""
        return self.macs / self.published_macs - 1

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self) | {"params_difference": self.params_difference, "macs_difference": self.macs_difference}


def rows(table: Table) -> Iterator[Row]:
    """Compile the network of `table` at each of its ratios, and count.

    The layers are grouped once; only truncation and lowering run again for each ratio.
    """
    grouped, width = _grouped(table.model, table.groups, table.ignore, tuple(table.options.items()), table.head)
    image = (torch.zeros(1, 3, table.size, table.size),)
    counted: dict[tuple[float, float], tuple[int, int, int]] = {}
    for label, conv_ratio, linear_ratio, published_params, published_macs in table.rows:
        ratios = conv_ratio, linear_ratio
        if ratios not in counted:
            small = _compiled(grouped, *ratios)
            counted[ratios] = paper_params(small), count_macs(small, image)[""], _numel(small)
        params, macs, true = counted[ratios]
        kept = 1 - linear_ratio
        heads = {each.name: round(each.outputs * (width * (kept if each.pruned else 1) + 1)) for each in table.readings}
        likely = next(iter(heads.values()), 0)
        readings = {name: params + head for name, head in heads.items()}
        yield Row(
            table.number,
            label,
            *ratios,
            published_params,
            params + likely,
            published_macs,
            macs,
            true + likely,
            readings,
        )


@lru_cache(maxsize=1)  # Tables 5 and 6 are of the same two networks
def _grouped(
    name: str, groups: int, ignore: tuple[str, ...], options: tuple[tuple[str, int], ...], head: str | None
) -> tuple[Compilation, int]:
    """A network with its layers grouped, and how many channels the layer `head` reads, which is taken out of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models_zoo.create(name, **dict(options)).eval()
    width = 0
    if head is not None:
        width = model.get_submodule(head).in_features  # type: ignore[assignment]
        model.set_submodule(head, nn.Identity())
    settings = checked_settings(model, groups=groups, ratio=0.0, ignore=ignore)
    return run_passes((*ANALYSIS, *GROUPING), Compilation(model, {SETTINGS: settings})), width


def _compiled(grouped: Compilation, conv_ratio: float, linear_ratio: float) -> nn.Module:
    model = copy_model(grouped.model)
    if conv_ratio == linear_ratio == 0:
        return model
    targets = {
        path: replace(target, ratio=linear_ratio if isinstance(model.get_submodule(path), nn.Linear) else conv_ratio)
        for path, target in grouped[TARGETS].items()
    }
    known: Facts = {TARGETS: targets, REASONS: grouped[REASONS], GROUPS: grouped[GROUPS]}
    lower(model, run_passes(PRUNING, Compilation(model, known))[PLANS])
    return model


def paper_params(model: nn.Module) -> int:
    """Parameters as the paper counts them: kept weights, two per live filter, and the biases of live outputs."""
    found = plans(model)
    count = 0
    for path, layer in model.named_modules():
        if path in found or isinstance(layer, _ConvNd | nn.Linear):
            plan = found.get(path) or LayerPlan.of(layer, reason="dense")
            live = sum(filters for filters, inputs in plan.block_sizes if inputs) if plan.grouped else plan.out_channels
            per_filter = 1 if is_linear(layer) else 2
            count += sum(p.numel() for name, p in layer.named_parameters() if name == "weight") + per_filter * live
    return count


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def format_table(table: Table, lines: list[Row]) -> str:
    """One table for the terminal."""
    from tabulate import tabulate

    params = list(lines[0].readings) or ["compiled"]
    head = ["model", "params, paper"]
    head += [column for name in params for column in (name, "difference")]
    head += ["true count", "MACs, paper", "compiled", "difference"]
    body = []
    for row in lines:
        counts = list(row.readings.values()) or [row.params]
        cells = [row.model, f"{row.published_params / 1e6:.2f}M"]
        for count in counts:
            cells += [f"{count / 1e6:.3f}M", _percent(count / row.published_params - 1)]
        cells += [f"{row.true_params / 1e6:.3f}M", f"{row.published_macs / 1e6:.2f}M", f"{row.macs / 1e6:.2f}M"]
        body.append([*cells, _percent(row.macs_difference)])
    text = tabulate(body, head, colalign=["left"] + ["right"] * (len(head) - 1), disable_numparse=True)
    return f"Table {table.number}. {table.title}\n{text}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%"
