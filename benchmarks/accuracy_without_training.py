"""Accuracy without training: what is left after compression alone, calibrated, with budgets, and distilled.

``python -m benchmarks.accuracy_without_training [--data ../shared/data] [--only resnet20/16/0.5]
[--results docs/accuracy.json] [--plot docs/accuracy.png]``

Every row is measured on all 9,980 test images; calibration and distillation see training images only, without labels
(but for the Taylor criteria). Rows that the results have already are not measured again, and each is written as soon as
it is known. Must reach, with 16 groups and at most 512 images, in points below the dense network:

- ResNet-20, uniform ratios: 5.5 at 0.5, 13.5 at 0.65; with budgets at equal MACs 3.5 and 10.5;
- DenseNet-BC-100: 1.3 and 2.8; with budgets 0.9 and 2.0;
- distilled after that, ResNet-20: 4.0 and 8.0 with 512 images and 1,200 steps, 2.8 and 5.2 with 4,096 and 1,600;
- above Torch-Pruning with re-estimated norms by 5 points at half of the MACs and 15 at a third.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import sgfx
from benchmarks.channel_pruning import pruned_channels, reestimate_norms
from benchmarks.cifar import DENSENET_BC, RESNET20, RESNET44, Trained, chosen, read, top1
from benchmarks.machine import describe_machine
from sgfx.reporting.counting import count_macs
from sgfx.training.distillation import descend

NETWORKS = {"resnet20": RESNET20, "densenet_bc": DENSENET_BC, "resnet44": RESNET44}
GROUPS = (16, 8)
RATIOS = (0.5, 0.65, 0.3, 0.8, 0.675)  # the last leaves a third of ResNet-20's MACs
IMAGES = 512
CRITERIA = ("l2", "taylor")


@dataclass
class Bench:
    """A trained network with the images that it is worked on."""

    folder: Path
    network: Trained

    @cached_property
    def dense(self) -> nn.Module:
        """The network as it was trained."""
        return self.network.load(self.folder)

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """Training images as bytes, and their classes."""
        return read(self.folder, "train")

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Test images as bytes, and their classes."""
        return read(self.folder, "test")

    def images(self, count: int = IMAGES) -> Tensor:
        """Inputs made of `count` training images."""
        pixels = self.train[0]
        return self.network.inputs(pixels[chosen(count, len(pixels))])

    def labels(self) -> Tensor:
        """Classes of the images of `images`, for Taylor criteria alone."""
        return self.train[1][chosen(IMAGES, len(self.train[1]))]

    def share(self, small: nn.Module) -> float:
        """The share of the dense network's MACs that a compressed one has."""
        example = (self.images(1),)
        return count_macs(small, example)[""] / count_macs(self.dense, example)[""]

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on all test images, in percent."""
        return top1(model, self.network, *self.test)

    def taylor(self) -> Callable[[Tensor], Tensor]:
        """First-order Taylor importance ``|w · ∂loss/∂w|``, a criterion that knows a layer by its weight."""
        twin = self.network.load(self.folder)
        F.cross_entropy(twin(self.images()), self.labels()).backward()  # type: ignore[no-untyped-call]
        scores = {}
        for parameter in twin.parameters():
            if parameter.dim() > 1 and parameter.grad is not None:
                effect = (parameter.detach() * parameter.grad).reshape(*parameter.shape[:2], -1).sum(2)
                scores[parameter.shape, float(parameter.detach().double().sum())] = effect.abs()
        return lambda weight: scores[weight.shape, float(weight.double().sum())]


Method = Callable[[Bench, int, float], nn.Module]


def uniform(bench: Bench, groups: int, ratio: float, **options: Any) -> nn.Module:
    """Compiled with one ratio for all layers."""
    return sgfx.compile(bench.dense, groups=groups, ratio=ratio, **options)


def budgeted(bench: Bench, groups: int, ratio: float) -> nn.Module:
    """Compiled with a budget: the MACs that the uniform ratio leaves."""
    share = bench.share(uniform(bench, groups, ratio))
    return sgfx.compile(bench.dense, groups=groups, budget={"macs": share}, calibration=bench.images())


def distilled(start: Method, images: int, steps: int) -> Method:
    """Another method's result, distilled."""

    def method(bench: Bench, groups: int, ratio: float) -> nn.Module:
        return sgfx.distill(bench.dense, start(bench, groups, ratio), bench.images(images), steps=steps, lr=2e-3)

    return method


def by_criterion(name: str, *, calibrated: bool) -> Method:
    """Compiled by another criterion than l1."""

    def method(bench: Bench, groups: int, ratio: float) -> nn.Module:
        criterion: Any = bench.taylor() if name == "taylor" else name
        data = {"calibration": bench.images()} if calibrated else {}
        return uniform(bench, groups, ratio, criterion=criterion, **data)

    return method


def peer(*, taylor: bool) -> Method:
    """Torch-Pruning at the MACs that the uniform ratio leaves, with its batch norms re-estimated on the same images."""

    def method(bench: Bench, groups: int, ratio: float) -> nn.Module:
        share = bench.share(uniform(bench, groups, ratio))
        small, _ = pruned_channels(bench.dense, share, bench.images(), bench.labels() if taylor else None)
        return reestimate_norms(small, torch.split(bench.images(), 64))

    return method


def calibrated(bench: Bench, groups: int, ratio: float) -> nn.Module:
    """Compiled with one ratio for all layers, and calibrated."""
    return uniform(bench, groups, ratio, calibration=bench.images())


def peer_distilled(bench: Bench, groups: int, ratio: float) -> nn.Module:
    """Torch-Pruning's network, distilled by the same mechanism in the same 400 steps."""
    small = peer(taylor=False)(bench, groups, ratio)
    return descend(bench.dense, small, bench.images(), steps=400, lr=2e-3)


def norms(bench: Bench, groups: int, ratio: float) -> nn.Module:
    """Compiled with one ratio for all layers, with its batch norms re-estimated."""
    return reestimate_norms(uniform(bench, groups, ratio), torch.split(bench.images(), 64))


METHODS: dict[str, Method] = {
    "calibrated": calibrated,
    "budget": budgeted,
    "pruned": uniform,
    "norms": norms,
    "peer-l1": peer(taylor=False),
    "peer-taylor": peer(taylor=True),
    "distilled-512-400": distilled(calibrated, 512, 400),
    "distilled-512-1200": distilled(calibrated, 512, 1200),
    "distilled-4096-1600": distilled(calibrated, 4096, 1600),
    "budget-distilled-512-1200": distilled(budgeted, 512, 1200),
    "budget-distilled-4096-1600": distilled(budgeted, 4096, 1600),
    "peer-l1-distilled-512-400": peer_distilled,
    **{f"pruned-{name}": by_criterion(name, calibrated=False) for name in CRITERIA},
    **{f"calibrated-{name}": by_criterion(name, calibrated=True) for name in CRITERIA},
}

CURVES = {  # what is drawn, and its name there
    "budget-distilled-4096-1600": "budget, distilled (4,096 images, 1,600 steps)",
    "distilled-4096-1600": "uniform ratios, distilled (4,096 images, 1,600 steps)",
    "budget-distilled-512-1200": "budget, distilled (512 images, 1,200 steps)",
    "distilled-512-1200": "uniform ratios, distilled (512 images, 1,200 steps)",
    "budget": "budget, calibrated",
    "calibrated": "uniform ratios, calibrated",
    "norms": "uniform ratios, norms re-estimated",
    "pruned": "uniform ratios, nothing else",
    "peer-l1-distilled-512-400": "Torch-Pruning (L1), distilled (512 images, 400 steps)",
    "peer-taylor": "Torch-Pruning (Taylor), norms re-estimated",
    "peer-l1": "Torch-Pruning (L1), norms re-estimated",
}


def rows() -> Iterator[tuple[str, str, int, float]]:
    """Key, network, groups and ratio of every row, those that must be reached first."""
    for method in METHODS:
        for groups in GROUPS:
            for network in NETWORKS:
                for ratio in RATIOS:
                    if network != "densenet_bc" or not method.startswith("peer"):
                        yield f"{network}/{groups}/{ratio}/{method}", network, groups, ratio


def measure(bench: Bench, method: Method, groups: int, ratio: float) -> dict[str, float]:
    """Make a row's network and measure it."""
    start = time.process_time()
    small = method(bench, groups, ratio)
    seconds = time.process_time() - start
    return {"top1": bench.accuracy(small), "macs": bench.share(small), "cpu_seconds": seconds}


def main() -> None:
    """Measure the rows that are asked for and not known yet; print the table and draw the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="*", help="pattern of the rows: network/groups/ratio/method")
    parser.add_argument("--results", type=Path, default=Path("docs/accuracy.json"))
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    benches = {name: Bench(options.data, network) for name, network in NETWORKS.items()}
    for key, network, groups, ratio in rows():
        if fnmatch(key, options.only):
            results = _known(options.results)
            bench = benches[network]
            if f"{network}/dense" not in results:
                results[f"{network}/dense"] = {"top1": bench.accuracy(bench.dense), "macs": 1.0, "cpu_seconds": 0.0}
            if key not in results:
                results[key] = measure(bench, METHODS[key.rpartition("/")[2]], groups, ratio)
                print(key, results[key], flush=True)
            _write(options.results, results)
    results = _known(options.results)
    print(describe_machine())
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)


def _known(path: Path) -> dict[str, dict[str, float]]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _write(path: Path, results: dict[str, dict[str, float]]) -> None:
    path.write_text(json.dumps(_known(path) | results, indent=1, sort_keys=True) + "\n")


def table(results: dict[str, dict[str, float]]) -> str:
    """Rows of the results: accuracy, what is lost against the dense network, and the MACs that remain."""
    lines = []
    for key, found in sorted(results.items()):
        lost = results[f"{key.split('/')[0]}/dense"]["top1"] - found["top1"]
        lines.append([key, f"{found['top1']:.2f}", f"{lost:.2f}", f"{100 * found['macs']:.1f}%"])
    return str(tabulate(lines, ["row", "top-1", "below dense", "MACs"], disable_numparse=True))


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Top-1 over the share of MACs that remains, one line per method of ResNet-20 with 16 groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5))
    for index, (method, label) in enumerate(CURVES.items()):
        keys = [key for key in results if key.startswith("resnet20/16/") and key.endswith(f"/{method}")]
        points = sorted((100 * results[key]["macs"], results[key]["top1"]) for key in keys)
        if points:
            style = "--" if method.startswith("peer") else "-"
            axes.plot(*zip(*points, strict=True), style, marker="os^D"[index % 4], markersize=5, label=label)
    axes.axhline(results["resnet20/dense"]["top1"], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="MACs that remain (%)", ylabel="top-1 on all test images (%)", title="ResNet-20, 16 groups")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
