"""The two trained checkpoints and real test images of CIFAR-10, where they are at hand beside the repository."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models_zoo

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the repository")


def images(count: int) -> tuple[Tensor, Tensor]:
    """`count` test images ``[count, 3, 32, 32]`` in [0, 1], spread over all, and their classes, numbered by name."""
    import numpy as np
    from PIL import Image

    with zipfile.ZipFile(DATA / "cifar10.zip") as archive:
        names = sorted(
            name for name in archive.namelist() if name.startswith("cifar10/test/") and name.endswith(".webp")
        )
        classes = sorted({name.split("/")[2] for name in names})
        chosen = [names[i * len(names) // count] for i in range(count)]
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in chosen]
    labels = torch.tensor([classes.index(name.split("/")[2]) for name in chosen])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, labels


@pytest.mark.parametrize(
    ("name", "file", "mean", "std", "count", "at_least"),
    [
        ("resnet20", "resnet20-12fca82f.th", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 500, 0.88),
        (
            "densenet_bc",
            "densenet-bc-100-12-cifar10.pth.tar",
            (0.4914, 0.4822, 0.4465),
            (0.2023, 0.1994, 0.2010),
            50,
            0.91,
        ),
    ],
    ids=["resnet20", "densenet_bc"],
)
def test_accuracy_of_trained_weights(name, file, mean, std, count, at_least):
    model = models_zoo.load_checkpoint(models_zoo.create(name), DATA / file).eval()
    x, labels = images(count)
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        scores = torch.cat([model(batch) for batch in x.split(100)])
    accuracy = (scores.argmax(1) == labels).double().mean().item()
    assert accuracy > at_least
