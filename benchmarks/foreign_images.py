"""What calibration on foreign images does, and whether it can be seen in the norms.

``python -m benchmarks.foreign_images [--data ../shared/data] [--network resnet20] [--only "own 512"]``

For each kind of images: the mean divergence of what the norms see from what they have learnt, whether `sgfx.calibrate`
warns, and top-1 on 4,000 test images after calibration at 16 groups and a ratio of 0.5.
"""

from __future__ import annotations

import argparse
import copy
import io
import warnings
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor

import sgfx
from benchmarks.cifar import DENSENET_BC, RESNET20, RESNET44, Trained, chosen, read, top1
from benchmarks.machine import describe_machine
from passes.calibration.foreign_data import seen_by_norms

NETWORKS = {network.name: network for network in (RESNET20, RESNET44, DENSENET_BC)}
COUNT, TESTED = 512, 4000


def pictures(archive: Path, part: str, crop: int | None) -> Tensor:
    """`COUNT` JPEG images of an archive as bytes ``[N, 3, 32, 32]``, of random places where `crop` is given."""
    generator = np.random.default_rng(0)
    found = []
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if part in name and name.lower().endswith((".jpeg", ".jpg")))
        for index in range(COUNT):
            image = Image.open(io.BytesIO(files.read(names[index % len(names)]))).convert("RGB")
            if crop is not None:
                left, top = (int(generator.integers(0, size - crop)) for size in image.size)
                image = image.crop((left, top, left + crop, top + crop))
            found.append(np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def kinds(network: Trained, folder: Path) -> dict[str, Tensor]:
    """Inputs of every kind, by name."""
    pixels, classes = read(folder, "train")
    own = pixels[chosen(COUNT, len(pixels))]
    generator = torch.Generator().manual_seed(0)
    other = RESNET20 if network is DENSENET_BC else DENSENET_BC
    inputs, shuffled = network.inputs(own), torch.randperm(32 * 32, generator=generator)
    one_colour = torch.randint(0, 256, (COUNT, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    return {
        "own 512": inputs,
        "own 32": inputs[:32],
        "own 8": inputs[:8],
        "own, of one class": network.inputs(pixels[classes == 3][:COUNT]),
        "own, another network's normalisation": other.inputs(own),
        "own, blue for red": inputs.flip(1),
        "own, grey": inputs.mean(1, keepdim=True).expand_as(inputs).contiguous(),
        "own, scaled to [-1, 1]": (own.float() / 255 - 0.5) / 0.5,
        "own, scaled to [0, 1]": own.float() / 255,
        "own, pixels shuffled": inputs.flatten(2)[:, :, shuffled].view_as(inputs),
        "imagenette": network.inputs(pictures(folder / "imagenette.zip", "/train/", None)),
        "blood cells": network.inputs(pictures(folder / "bccd.zip", "", 128)),
        "noise": torch.randn(COUNT, 3, 32, 32, generator=generator),
        "one colour each": network.inputs(one_colour.expand(-1, -1, 32, 32).contiguous()),
    }


def main() -> None:
    """Measure the kinds that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--only", default="*", help="pattern of the kinds of images")
    parser.add_argument("--divergence-only", action="store_true", help="do not calibrate, which takes most of the time")
    options = parser.parse_args()
    network = NETWORKS[options.network]
    dense = network.load(options.data)
    pixels, classes = read(options.data, "test")
    tested = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))[:TESTED]
    compiled = sgfx.compile(dense, groups=16, ratio=0.5)
    lines = []
    for kind, images in kinds(network, options.data).items():
        if fnmatch(kind, options.only):
            seen = seen_by_norms(dense, [(part,) for part in torch.split(images, 64)])
            line = [kind, f"{sum(norm.divergence for norm in seen) / len(seen):.3f}"]
            if not options.divergence_only:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    small = sgfx.calibrate(dense, copy.deepcopy(compiled), images)
                top = top1(small, network, pixels[tested], classes[tested])
                line += ["yes" if caught else "no", f"{top:.2f}"]
            lines.append(line)
            print(*line, flush=True)
    print(describe_machine())
    print(tabulate(lines, ["images", "divergence", "warning", "top-1"], disable_numparse=True))


if __name__ == "__main__":
    main()
