"""A detector compressed from few images: precision without labels and after fine-tuning, beside the peer.

``python -m benchmarks.detection --data BCCD --runs RUNS [--only 0.5/distilled/0] [--results docs/detection.json]``

`BCCD` is the unpacked ``bccd.zip``: blood cells, 264 images to train on, 100 to measure on. The detector is Faster
R-CNN on a ResNet-18 from scratch, with a pyramid of 64 channels, at 200 pixels. The trunk is compressed to 50 and 35 %
of its MACs, 16 groups; pyramid and heads stay dense. Runs are kept in folders of `RUNS` and go on where they were
stopped; rows that the results have are not run again. Every row is compared with the dense detector on the same images,
drawn anew with replacement (a paired bootstrap). Must show, in points of mAP below dense: without labels at most 2.5
and 6, fine-tuned for a quarter of the dense epochs at most 1.5 and 3, and above Torch-Pruning without labels.

Training runs in bfloat16. With ``--epochs 4 --iterations 2 --steps 2 --images 8`` every row is only tried.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
import sgfx
from benchmarks.channel_pruning import pruned_channels, reestimate_norms
from benchmarks.machine import describe_machine
from sgfx.data.detection import DetectionLoaders, open_detection
from sgfx.files.writing import replacing
from sgfx.reporting.counting import count_macs
from sgfx.training.distillation import descend
from sgfx.training.tasks.precision import average_precision

GROUPS, BATCH, RESAMPLES = 16, 4, 200
SHARES = (0.5, 0.35)
Found = list[dict[str, dict[str, Tensor]]]  # of each image what was found, and what is there


@dataclass(frozen=True)
class Row:
    """One detector: the share of the trunk's MACs that remains, how it is made, and the seed of the compression."""

    share: float
    way: str
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name."""
        return f"{self.share}/{self.way}/{self.seed}"


OURS = ("compressed", "calibrated", "distilled", "fine-tuned")
PEER = ("peer", "peer-distilled", "peer-fine-tuned")  # which has nothing random in it
ROWS = [
    *(Row(share, way, seed) for share in SHARES for seed in range(3) for way in OURS),
    *(Row(share, way) for share in SHARES for way in PEER),
]


class Bench:
    """The data, the dense detector, and what is made of it.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the annotations."""
        self.options = options
        self.loaders = DetectionLoaders(open_detection(options.data), batch_size=BATCH, workers=options.workers)

    @cached_property
    def dense(self) -> nn.Module:
        """The dense detector, trained, or trained on from where it stands."""
        torch.manual_seed(0)
        classes = len(self.loaders.classes) + 1
        model: nn.Module = models_zoo.faster_rcnn(
            "resnet18", num_classes=classes, channels=64, min_size=200, max_size=334
        )
        self.train(model, "dense", self.options.epochs, lr=0.02, warmup=2)
        model.eval()
        return model

    @cached_property
    def images(self) -> list[list[Tensor]]:
        """Training images without labels."""
        return self.loaders.unlabelled(self.options.images)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The same as the trunk reads them."""
        detector: Any = self.dense
        return [detector.transform(images)[0].tensors for images in self.images]

    def train(self, model: nn.Module, name: str, epochs: int, **options: Any) -> None:
        """Train in a folder of this name."""
        sgfx.Trainer(
            model,
            self.loaders.train,
            self.loaders.val,
            epochs=max(1, epochs),
            iterations=self.options.iterations,
            task="detection",
            schedule="cosine",
            clip_norm=5.0,
            mixed_precision="bf16",
            folder=self.options.runs / name,
            resume=True,
            **options,
        ).fit()

    def made(self, row: Row) -> nn.Module:
        """The detector of a row."""
        start = "peer" if row.way.startswith("peer") else "compressed" if row.way == "compressed" else "calibrated"
        small: nn.Module = self._kept(Row(row.share, start, row.seed))
        if row.way.endswith("distilled"):
            descend(self.dense, small, self.images, steps=self.options.steps, lr=1e-3)
        elif row.way.endswith("fine-tuned"):
            self.train(small, row.key.replace("/", "-"), self.options.epochs // 4, lr=0.01)
        return small

    def share(self, model: Any) -> float:
        """What is left of the trunk's MACs."""
        one = (self.batches[0][:1],)
        dense: Any = self.dense
        return count_macs(model.backbone.body, one)[""] / count_macs(dense.backbone.body, one)[""]

    def _kept(self, row: Row) -> Any:
        """What is made without training, from a file if it has been made before; the peer's is made anew."""
        file = self.options.runs / f"{row.key.replace('/', '-')}.safetensors"
        small: Any = copy.deepcopy(self.dense)
        if file.exists():
            return sgfx.load(file, into=small)
        body = small.backbone.body
        if row.way == "peer":
            body, _ = pruned_channels(body, row.share, self.batches[0])
            small.backbone.body = reestimate_norms(body, self.batches)
            return small
        if row.way == "calibrated":
            share = {"macs": row.share}
            small.backbone.body = sgfx.compile(
                body, groups=GROUPS, budget=share, calibration=self.batches, seed=row.seed
            )
        else:
            ratio = 1 - row.share
            for _ in range(4):  # what is left of the MACs is nearly a straight line
                small.backbone.body = sgfx.compile(body, groups=GROUPS, ratio=ratio, seed=row.seed)
                left = self.share(small)
                if abs(left - row.share) < 0.002:
                    break
                ratio += left - row.share
        sgfx.save(small, file)
        return small


def found_by(model: nn.Module, loaders: DetectionLoaders) -> Found:
    """What a detector finds in the validation images."""
    images: Found = []
    with torch.inference_mode():
        for inputs, targets in loaders.val:
            outputs = model.eval()(inputs)
            images += [{"found": one, "true": other} for one, other in zip(outputs, targets, strict=True)]
    return images


def below(dense: Found, small: Found) -> dict[str, Any]:
    """By how many points of mAP a detector is below another: on the images, and on 95 % of draws of them."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(dense), (len(dense),), generator=generator).tolist() for _ in range(RESAMPLES)]
    differences = sorted(_map([dense[i] for i in draw]) - _map([small[i] for i in draw]) for draw in draws)
    low, high = differences[round(0.025 * RESAMPLES)], differences[round(0.975 * RESAMPLES) - 1]
    return {"below": _map(dense) - _map(small), "interval": [low, high]}


def _map(images: Found) -> float:
    return 100 * average_precision(images)[0]["map"]


def measure(bench: Bench, model: nn.Module, dense: Found | None) -> tuple[dict[str, Any], Found]:
    """What is told of a detector, and what it found."""
    images = found_by(model, bench.loaders)
    total, by_label = average_precision(images)
    classes = {bench.loaders.classes[label - 1]: 100 * value for label, value in by_label.items()}
    row: dict[str, Any] = {name: 100 * value for name, value in total.items()} | {"classes": classes}
    return row | {"macs": bench.share(model)} | (below(dense, images) if dense is not None else {}), images


def main() -> None:
    """Run the rows that are asked for and not known yet, and print all that are known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the unpacked bccd.zip")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", default="*", help="pattern of the rows: share/way/seed")
    parser.add_argument("--results", type=Path, default=Path("docs/detection.json"))
    parser.add_argument("--epochs", type=int, default=60, help="of the dense detector; fine-tuning has a quarter")
    parser.add_argument("--iterations", type=int, default=None, help="end every training after so many batches")
    parser.add_argument("--steps", type=int, default=400, help="of distilling")
    parser.add_argument("--images", type=int, default=264, help="without labels, to calibrate and distil on")
    parser.add_argument("--workers", type=int, default=1)
    bench = Bench(parser.parse_args())
    bench.options.runs.mkdir(parents=True, exist_ok=True)
    print(describe_machine())
    _run(bench)


def _run(bench: Bench) -> None:
    results, dense = bench.options.results, None
    for row in [None, *ROWS]:
        key = "dense" if row is None else row.key
        known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
        if row is not None and not fnmatch(key, bench.options.only):
            continue
        if key not in known:
            began = time.process_time()
            if row is not None and dense is None:
                dense = found_by(bench.dense, bench.loaders)
            known[key], _ = measure(bench, bench.dense if row is None else bench.made(row), dense)
            known[key]["cpu_seconds"] = time.process_time() - began
            with replacing(results) as temporary:
                temporary.write_text(json.dumps(known, indent=1))
        told = known[key]
        print(f"{key:24} mAP {told['map']:5.1f}  mAP50 {told['map50']:5.1f}  MACs {100 * told['macs']:5.1f} %", end="")
        low, high = told.get("interval", (0.0, 0.0))
        print(f"  below dense {told['below']:5.2f} [{low:.2f}, {high:.2f}]" if "below" in told else "", flush=True)


if __name__ == "__main__":
    main()
