"""Accuracy with training: fine-tuned by the paper's recipes, from several starts, beside the peer.

``python -m benchmarks.fine_tuning --runs RUNS [--data ../shared/data] [--only resnet20/0.65/global]
[--results docs/fine_tuning.json]``

Every row is ResNet-20 with 16 groups on CIFAR-10, all test images, with the schedule of ``cifar-global`` shortened to
the row's epochs: 0.01, a tenth of it after half and a hundredth after three quarters. Runs are kept in folders of
`RUNS` and go on where they were stopped; rows that the results have are not run again. All train in mixed precision
(bfloat16) and with their pixels' channels side by side, which halves the time: an epoch takes two minutes of one core,
and several processes may share `RUNS` and the results if their rows differ. Must reach after 20 epochs, in points below
the dense network: 0.4, 1.8 and 5.5 at 50.6, 35.8 and 20 % of the MACs, above Torch-Pruning with the same recipe at the
last two, and not more than 0.2 below it at the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sgfx
from benchmarks.accuracy_without_training import Bench
from benchmarks.channel_pruning import pruned_channels, reestimate_norms
from benchmarks.cifar import RESNET20
from benchmarks.machine import describe_machine
from sgfx.data.augmentation import Augmentation
from sgfx.data.normalization import Normalization

GROUPS, EPOCHS, SHORT = 16, 20, 5
RATIOS = (0.65, 0.81, 0.5)  # leave 35.8, 20 and 50.6 % of the MACs


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        ratio: what uniform ratios would be; budgets and the peer have the MACs that it leaves.
        start: where training starts from.
        epochs: of global training.
        teacher: whether the dense network's outputs are the targets, in place of the labels.
    """

    ratio: float
    start: str
    epochs: int = EPOCHS
    teacher: bool = False

    @property
    def key(self) -> str:
        """Its name."""
        return f"resnet20/{self.ratio}/{self.start}{'+teacher' if self.teacher else ''}/{self.epochs}"


ROWS = [
    *(Row(ratio, start) for ratio in RATIOS for start in ("global", "peer", "budget")),
    *(Row(ratio, "budget", teacher=True) for ratio in RATIOS),
    *(Row(0.65, start, SHORT, teacher) for start in ("global", "calibrated", "budget") for teacher in (False, True)),
    Row(0.65, "local-global", SHORT),
]


def compressed(bench: Bench, row: Row) -> nn.Module:
    """The network that training starts from."""
    uniform = partial(sgfx.compile, bench.dense, groups=GROUPS, ratio=row.ratio)
    if row.start == "global":
        return uniform()
    if row.start == "calibrated":
        return uniform(calibration=bench.images())
    share = bench.share(uniform())
    if row.start == "budget":
        return sgfx.compile(bench.dense, groups=GROUPS, budget={"macs": share}, calibration=bench.images())
    small, _ = pruned_channels(bench.dense, share, bench.images())
    return reestimate_norms(small, torch.split(bench.images(), 64))


def loaders(bench: Bench) -> tuple[Any, Any, Augmentation]:
    """Training images as bytes, test images as inputs, and what crops, flips and normalises the former."""
    pixels, classes = bench.test
    train = DataLoader(TensorDataset(*bench.train), batch_size=64, shuffle=True)
    test = list(zip(torch.split(bench.network.inputs(pixels), 256), torch.split(classes, 256), strict=True))
    network = bench.network
    return train, test, Augmentation(Normalization(network.mean, network.std), crop=True, flip=True)


def measure(bench: Bench, row: Row, folder: Path) -> dict[str, Any]:
    """Run a row, or what is left of it."""
    began = time.process_time()
    train, test, augmented = loaders(bench)
    recipe = sgfx.recipe("cifar-local-global" if row.start == "local-global" else "cifar-global")
    halves = row.epochs // 2, row.epochs * 3 // 4
    options = {"transform": augmented, "checkpoint_steps": 100, "mixed_precision": "bf16"}
    last = replace(recipe.last, epochs=row.epochs, schedule=halves, options=options)
    dense = copy.deepcopy(bench.dense).to(memory_format=torch.channels_last)
    common: dict[str, Any] = {"teacher": dense if row.teacher else None, "folder": folder, "resume": True}
    if row.start == "local-global":
        local = replace(recipe.local, epochs=1, options=options) if recipe.local is not None else None
        chosen = replace(recipe, step=0.13, local=local, last=last)
        outcome = chosen.run(dense, train, test, groups=GROUPS, ratio=row.ratio, **common)
        small, history = outcome.model, outcome.history
    else:
        small = _started(bench, row, folder).to(memory_format=torch.channels_last)
        history = sgfx.Trainer(small, train, test, **last.arguments(), **common).fit()
    curve = [100 * (each.val_top1 or 0.0) for each in history.epochs]
    return {
        "top1": bench.accuracy(small),
        "curve": curve,
        "macs": bench.share(small),
        "cpu_seconds": time.process_time() - began,
    }


def _started(bench: Bench, row: Row, folder: Path) -> nn.Module:
    """The start of a row, from a file if it has been made before; the peer's is made anew, which takes no time."""
    file = folder / "start.safetensors"
    if file.exists():
        return sgfx.load(file, into=copy.deepcopy(bench.dense))
    small = compressed(bench, row)
    if row.start != "peer":
        folder.mkdir(parents=True, exist_ok=True)
        sgfx.save(small, file)
    return small


def _known(results: Path) -> dict[str, Any]:
    return dict(json.loads(results.read_text())) if results.exists() else {}


def main() -> None:
    """Run the rows that are asked for and not known yet, and print all that are known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="*", help="pattern of the rows: network/ratio/start/epochs")
    parser.add_argument("--results", type=Path, default=Path("docs/fine_tuning.json"))
    options = parser.parse_args()
    bench = Bench(options.data, RESNET20)
    print(describe_machine())
    for row in ROWS:
        known = _known(options.results)
        if fnmatch(row.key, options.only):
            if row.key not in known:
                found = measure(bench, row, options.runs / row.key.replace("/", "-"))
                known = _known(options.results) | {row.key: found}  # read again: others may have written meanwhile
                options.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            print(row.key, f"{known[row.key]['top1']:.2f} at {100 * known[row.key]['macs']:.1f} %", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
