"""How long channel analysis and elimination take beyond the rest of a compilation, and how they grow.

``python -m benchmarks.analysis_time``. Must reach: ResNet-152 and DenseNet-201 (16 groups, 80 %) at most 2 s each; time
linear in the nodes of chains 1×, 2× and 4× as deep. A DenseNet twice as long joins twice as many tensors of twice the
channels, four times the labels, though not four times the nodes: how much of that is seen in time is printed too.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torchvision.models import DenseNet, resnet152

import models_zoo
import sgfx
from benchmarks.compile_time import chain
from benchmarks.machine import describe_machine
from passes.elimination.analysis import ChannelAnalysis
from passes.elimination.elimination import Elimination
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.options.settings import SETTINGS, Settings
from passes.tracing.regions import REGIONS

ROUNDS = 3


def main() -> None:
    """Print the measurements."""
    print(describe_machine())
    measure("warm-up", models_zoo.create("resnet20"))
    measure("ResNet-152", resnet152())
    measure("DenseNet-201", models_zoo.create("densenet201"))
    times = [measure(f"chain of {depth} convolutions and norms", normed_chain(depth)) for depth in (50, 100, 200)]
    print(f"chains 2× and 4× as deep: {times[1] / times[0]:.2f} and {times[2] / times[0]:.2f} times as long")
    short, long = (measure(f"DenseNet, 4 blocks of {n} layers", densenet(n)) for n in (12, 24))
    print(f"DenseNet twice as long: {long / short:.2f} times as long")


def measure(title: str, model: nn.Module) -> float:
    """Print and return the median seconds of analysis and elimination of a lowered model."""
    taken = []
    for _ in range(ROUNDS):
        small = sgfx.compile(model, groups=16, ratio=0.8)
        start = time.perf_counter()
        compilation = Compilation(small, {SETTINGS: Settings()})
        run_passes([ChannelAnalysis()], compilation)
        analysed = time.perf_counter()
        nodes = len(compilation[REGIONS].parts[0].graphs["eval"].graph.nodes)
        run_passes([Elimination()], compilation)
        taken.append((analysed - start, time.perf_counter() - analysed))
    analysis = statistics.median(first for first, _ in taken)
    elimination = statistics.median(second for _, second in taken)
    print(f"{title}: analysis {analysis:.2f} s, elimination and its check {elimination:.2f} s, {nodes} nodes")
    return analysis


def normed_chain(depth: int) -> nn.Module:
    """Equal convolutions and norms one after the other."""
    layers = (layer for conv in chain(depth).children() for layer in (conv, nn.BatchNorm2d(64)))
    return nn.Sequential(*layers)


def densenet(length: int) -> nn.Module:
    """A DenseNet of four blocks of this many layers."""
    torch.manual_seed(0)
    model: nn.Module = DenseNet(growth_rate=16, block_config=(length,) * 4)
    return model


if __name__ == "__main__":
    main()
