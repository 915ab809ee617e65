"""What several processes run, as a launcher starts them: training, and what came of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sgfx
from sgfx.training.history import History

EXAMPLES, BATCH, EPOCHS = 48, 8, 2


class Dying:
    """A transform that ends the process without a word when it is called for the nth time."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.left -= 1
        if self.left == 0:
            os._exit(9)
        return inputs, targets


def network() -> nn.Module:
    """A regrouped one without norms, the same each time."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return sgfx.compile(dense, groups=4, ratio=0.5)


def data(batch: int, shuffle: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(EXAMPLES, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(EXAMPLES) % 3), batch, shuffle=shuffle)


def train(batch: int, folder: Path | None = None, resume: bool = False, calls: int = 0) -> tuple[nn.Module, History]:
    """Train with batches of this size in each process."""
    model = network()
    validation = DataLoader(data(1, False).dataset, 5)  # 48 examples don't divide into tens
    options = {"accumulate": 2, "clip_norm": 0.5, "ema": 0.5, "schedule": "cosine", "checkpoint_steps": 1}
    if folder is None:
        del options["checkpoint_steps"]
    trainer = sgfx.Trainer(
        model,
        data(batch, shuffle=True),
        validation,
        epochs=EPOCHS,
        lr=0.2,
        folder=folder,
        resume=resume,
        transform=Dying(calls),
        progress=True,
        **options,
    )
    return model, trainer.fit()


def main(folder: Path, resume: bool, calls: int) -> None:
    """Train as one of several processes; the weights and the records lie in the folder then."""
    model, history = train(BATCH, folder / "run", resume, calls)
    rows = [record.to_dict() for record in history.epochs]
    torch.save({"model": model.state_dict(), "rows": rows}, folder / f"weights-{os.environ['RANK']}.pt")
    sys.stdout.write("marked" if hasattr(model, "_is_accelerate_prepared") else "untouched")
