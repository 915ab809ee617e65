"""CIFAR-10 and the three trained checkpoints for it, read from a folder beside the repository."""

from __future__ import annotations

import io
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import models_zoo

BATCH = 50


@dataclass(frozen=True)
class Trained:
    """A trained network: its name in the zoo, its checkpoint, and the normalisation of its inputs."""

    name: str
    file: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def load(self, folder: Path) -> nn.Module:
        """The network with its trained weights, in eval mode."""
        return models_zoo.load_checkpoint(models_zoo.create(self.name), folder / self.file).eval()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Normalised images ``[N, 3, 32, 32]`` from bytes."""
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


RESNET20 = Trained("resnet20", "resnet20-12fca82f.th", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESNET44 = Trained("resnet44", "resnet44-014dd654.th", RESNET20.mean, RESNET20.std)
DENSENET_BC = Trained(
    "densenet_bc", "densenet-bc-100-12-cifar10.pth.tar", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
)


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split as bytes ``[N, 3, 32, 32]`` and their classes ``[N]``; what was decoded is kept."""
    cache = Path(tempfile.gettempdir()) / f"sgfx-cifar10-{split}.npz"
    if not cache.exists():
        pixels, classes = _decoded(folder, split)
        np.savez(cache, pixels=pixels, classes=classes)
    arrays = np.load(cache)
    return torch.from_numpy(arrays["pixels"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays["classes"])


def _decoded(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with zipfile.ZipFile(folder / "cifar10.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"cifar10/{split}/") and n.endswith(".webp"))
        kinds = sorted({name.split("/")[2] for name in names})
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    return np.stack(pixels), np.array([kinds.index(name.split("/")[2]) for name in names])


def chosen(count: int, total: int) -> Tensor:
    """Which training images are used without labels: `count` of `total`, always the same."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


def top1(model: nn.Module, network: Trained, pixels: Tensor, classes: Tensor) -> float:
    """Accuracy in percent."""
    model.eval()
    with torch.inference_mode():
        parts = zip(torch.split(pixels, BATCH), torch.split(classes, BATCH), strict=True)
        hits = sum(int((model(network.inputs(x)).argmax(1) == y).sum()) for x, y in parts)
    return 100 * hits / len(classes)
