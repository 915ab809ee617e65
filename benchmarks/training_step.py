"""A training step of the lowered network against the dense one's: forward, backward and an SGD step, interleaved.

``python -m benchmarks.training_step``. Must reach: at most 1.10 for ResNet-20 (32², batch 64) and ResNet-50 (224²,
batch 8).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import models_zoo
import sgfx
from benchmarks.machine import describe_machine

CASES = (("resnet20", 32, 64, 8, 40), ("resnet50", 224, 8, 16, 12))


def main() -> None:
    """Print the median ratio of each case and its spread."""
    print(describe_machine())
    for name, size, batch, groups, rounds in CASES:
        torch.manual_seed(0)
        dense = models_zoo.create(name)
        small = sgfx.compile(dense, groups=groups, ratio=0.8)
        images = torch.randn(batch, 3, size, size)
        first, second = stepper(dense, images), stepper(small, images)
        ratios, seconds = [], []
        for index in range(rounds):
            # The order alternates, so that a drift of the machine's speed favours neither.
            a, b = (first, second) if index % 2 else (second, first)
            times = {each: each() for each in (a, b)}
            ratios.append(times[second] / times[first])
            seconds.append(times[first])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}, {size}², batch {batch}: lowered / dense {middle:.3f} (quartiles {low:.3f} to {high:.3f}, "
            f"{rounds} rounds), dense step {1000 * statistics.median(seconds):.0f} ms"
        )


def stepper(model: nn.Module, images: torch.Tensor) -> Callable[[], float]:
    """Return a function that makes one training step and returns its seconds."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        return time.perf_counter() - start

    step()
    return step


if __name__ == "__main__":
    main()
