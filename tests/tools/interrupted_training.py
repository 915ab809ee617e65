"""Training that uses all that a checkpoint must hold, to be killed at any moment and gone on with."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sgfx
from sgfx.training.recipes import Phase

EXAMPLES, BATCH = 40, 8


class Noisy(Dataset[tuple[Tensor, int]]):
    """Examples with noise from every generator there is, and one of their own."""

    def __init__(self) -> None:
        self.clean = torch.randn(EXAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        self.own = np.random.default_rng(3)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand() + self.own.random()
        return self.clean[index] + 0.1 * torch.randn(1, 6, 6) + 0.05 * noise, index % 4


class Mixing:
    """Noise on the batch, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + 0.1 * torch.randn(inputs.shape, generator=self.generator), targets


def network() -> nn.Sequential:
    """With a norm, averages of which count, and dropout, which draws."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 4)),
    )


def loader(workers: int = 0) -> DataLoader[Any]:
    """In random order."""
    return DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers)


VALIDATION = [(Noisy().clean, torch.arange(EXAMPLES) % 4)]
OPTIONS: dict[str, Any] = {"ema": 0.9, "clip_norm": 1.0, "decay_norms": False}


def train(folder: Path | None, *, resume: bool = False, **options: Any) -> tuple[nn.Module, sgfx.Trainer, Any]:
    """Train for two epochs of five batches."""
    model = network()
    given: dict[str, Any] = {"epochs": 2, "lr": 0.05, "schedule": "cosine", "transform": Mixing(), **OPTIONS, **options}
    data = given.pop("data", None) or loader()
    trainer = sgfx.Trainer(model, data, VALIDATION, folder=folder, resume=resume, progress=False, **given)
    return model, trainer, trainer.fit()


def follow(folder: Path | None, *, resume: bool = False, longer: int = 1) -> Any:
    """Run a recipe: two pruning steps with six iterations each, then two epochs, or so many times as many."""
    local, last = (replace(phase, options={**OPTIONS, "checkpoint_steps": 1}) for phase in _phases(longer))
    if folder is None:
        local, last = (replace(phase, options=OPTIONS) for phase in (local, last))
    recipe = replace(sgfx.recipe("cifar-local-global"), step=0.3, groups=2, local=local, last=last)
    return recipe.run(network(), loader(), ratio=0.5, folder=folder, resume=resume, progress=False)


def _phases(longer: int) -> tuple[Phase, Phase]:
    local = Phase(epochs=None, lr=0.001, iterations=6 * longer)
    return local, Phase(epochs=2 * longer, lr=0.01, schedule=(longer,))


def follow_as_one_of_several(folder: Path) -> None:
    """The same as several processes run it; each leaves its weights in ``RANK.pt``."""
    outcome = follow(folder / "run", resume=True)
    torch.save(outcome.model.state_dict(), folder / f"{os.environ['RANK']}.pt")


def follow_to_the_end(folder: Path, longer: int = 1) -> None:
    """The recipe as a process of its own runs it, by the same call whether it is the first or not."""
    follow(folder / "run", resume=True, longer=longer)


def kept_in(run: Path) -> dict[str, Any]:
    """What a finished recipe leaves: the model and the log byte for byte, checkpoints number for number."""
    files = {name: (run / name).read_bytes() for name in ("compressed.safetensors", "final.safetensors", "log.csv")}
    checkpoints = ("pruner.pt", "generators.pt", "global/last.pt")
    return files | {name: _plain(torch.load(run / name, weights_only=True)) for name in checkpoints}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
