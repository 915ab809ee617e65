"""`sgfx tables`: the Params and FLOPs columns of the paper's Tables 1 to 4, beside what the compiler yields.

Random weights suffice: sizes depend on the ratios, not on what the weights are. Parameters are counted as the paper
counts them: kept weights, two for the batch norm of each live filter, and the biases of live outputs. That leaves out
the batch norms over concatenated inputs of a DenseNet; the true count stands beside it. One multiply-add is one "FLOP".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
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
from sgfx.reporting.counting import count_macs

Published = tuple[str, float, float, float, float]  # model, conv ratio, linear ratio, parameters, MACs


@dataclass(frozen=True)
class Table:
    """One of the paper's tables: a network, how it is compressed, and what was published."""

    number: int
    title: str
    model: str
    size: int
    groups: int
    rows: tuple[Published, ...]
    options: dict[str, int] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a table: published, compiled (counted as the paper does), and the true parameter count."""

    table: int
    model: str
    conv_ratio: float
    linear_ratio: float
    published_params: float
    params: int
    published_macs: float
    macs: int
    true_params: int

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


TABLES = (
    Table(
        1,
        "DenseNet-121 on CIFAR-10, 32×32, 8 groups",
        "densenet121_cifar",
        32,
        8,
        (
            ("Baseline", 0, 0, 6.89e6, 888.36e6),
            ("DenseNet (Conv75/FC75)", 0.75, 0.75, 1.71e6, 221.90e6),
            ("DenseNet (Conv80/FC80)", 0.80, 0.80, 1.37e6, 177.72e6),
            ("DenseNet (Conv85/FC85)", 0.85, 0.85, 1.03e6, 134.10e6),
            ("DenseNet (Conv90/FC90)", 0.90, 0.90, 0.68e6, 89.77e6),
            ("DenseNet (Conv95/FC95)", 0.95, 0.95, 0.34e6, 45.76e6),
        ),
    ),
    Table(
        2,
        "DenseNet-121 on CIFAR-100, 32×32, 8 groups",
        "densenet121_cifar",
        32,
        8,
        (
            ("Baseline", 0, 0, 6.99e6, 888.45e6),
            ("DenseNet (Conv70/FC70)", 0.70, 0.70, 2.10e6, 266.60e6),
            ("DenseNet (Conv75/FC75)", 0.75, 0.75, 1.75e6, 222.14e6),
            ("DenseNet (Conv80/FC80)", 0.80, 0.80, 1.40e6, 176.46e6),
            ("DenseNet (Conv85/FC85)", 0.85, 0.85, 1.06e6, 133.46e6),
            ("DenseNet (Conv90/FC90)", 0.90, 0.90, 0.71e6, 89.86e6),
            ("DenseNet (Conv95/FC95)", 0.95, 0.95, 0.36e6, 45.67e6),
        ),
        options={"num_classes": 100},
    ),
    Table(
        3,
        "ResNet-50 on ImageNet, 224×224, 16 groups, downsample convolutions dense",
        "resnet50",
        224,
        16,
        (
            ("Baseline", 0, 0, 25.55e6, 4.09e9),
            ("ResNet-G (Conv60/FC60)", 0.6, 0.6, 11.88e6, 1.91e9),
            ("ResNet-G (Conv70/FC60)", 0.7, 0.6, 9.83e6, 1.55e9),
            ("ResNet-G (Conv80/FC60)", 0.8, 0.6, 7.76e6, 1.20e9),
            ("ResNet-LG (Conv60/FC60)", 0.6, 0.6, 11.87e6, 1.91e9),
            ("ResNet-LG (Conv70/FC60)", 0.7, 0.6, 9.83e6, 1.56e9),
            ("ResNet-LG (Conv80/FC60)", 0.8, 0.6, 7.76e6, 1.20e9),
        ),
        ignore=("*.downsample",),
    ),
    Table(
        4,
        "DenseNet-201 on ImageNet, 224×224, 16 groups",
        "densenet201",
        224,
        16,
        (
            ("Baseline", 0, 0, 19.82e6, 4.29e9),
            ("DenseNet-G (Conv70/FC60)", 0.7, 0.6, 6.00e6, 1.34e9),
            ("DenseNet-G (Conv80/FC60)", 0.8, 0.6, 4.32e6, 0.99e9),
            ("DenseNet-LG (Conv70/FC60)", 0.7, 0.6, 6.00e6, 1.34e9),
            ("DenseNet-LG (Conv80/FC60)", 0.8, 0.6, 4.32e6, 0.99e9),
        ),
    ),
)


def rows(table: Table) -> Iterator[Row]:
    """Compile the network of `table` at each of its ratios, and count.

    The layers are grouped once; only truncation and lowering run again for each ratio.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models_zoo.create(table.model, **table.options).eval()
    settings = checked_settings(model, groups=table.groups, ratio=0.0, ignore=table.ignore)
    grouped = run_passes((*ANALYSIS, *GROUPING), Compilation(model, {SETTINGS: settings}))
    image = (torch.zeros(1, 3, table.size, table.size),)
    counted: dict[tuple[float, float], tuple[int, int, int]] = {}
    for label, conv_ratio, linear_ratio, published_params, published_macs in table.rows:
        ratios = conv_ratio, linear_ratio
        if ratios not in counted:
            small = _compiled(grouped, *ratios)
            counted[ratios] = paper_params(small), count_macs(small, image)[""], _numel(small)
        params, macs, true = counted[ratios]
        yield Row(table.number, label, *ratios, published_params, params, published_macs, macs, true)


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

    head = ["model", "params, paper", "compiled", "difference", "true count", "MACs, paper", "compiled", "difference"]
    body = [
        [
            row.model,
            f"{row.published_params / 1e6:.2f}M",
            f"{row.params / 1e6:.3f}M",
            f"{100 * row.params_difference:+.1f}%",
            f"{row.true_params / 1e6:.3f}M",
            f"{row.published_macs / 1e6:.2f}M",
            f"{row.macs / 1e6:.2f}M",
            f"{100 * row.macs_difference:+.1f}%",
        ]
        for row in lines
    ]
    text = tabulate(body, head, colalign=["left"] + ["right"] * 7, disable_numparse=True)
    return f"Table {table.number}. {table.title}\n{text}"
