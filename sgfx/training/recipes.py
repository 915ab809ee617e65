"""Schedules by name, the paper's and those of detectors: how a model is compressed and trained, as plain data.

A recipe prunes at once, or step by step with a little training after each step (local), lowers the model, and trains
it (global). ``dataclasses.replace`` makes another one of it::

    recipe = sgfx.recipe("cifar-local-global")
    shorter = replace(recipe, last=replace(recipe.last, epochs=20, schedule=(10, 15)))
    outcome = shorter.run(model, train_loader, val_loader, ratio=0.8, folder="run", resume=True)

What `run` keeps in its folder:

- ``local-01/``, ``local-02/``, …: the folders of the `sgfx.Trainer` of each pruning step;
- ``pruner.pt``: the `sgfx.Pruner`, as it was when its last step began;
- ``generators.pt``: the states of random generators that the data have of their own, before global training;
- ``compressed.safetensors``: the lowered model, before global training (`sgfx.load` opens it);
- ``global/``: the folder of its trainer;
- ``log.csv``: a row for each epoch of all phases that are over;
- ``final.safetensors``: the finished model.

Each of them is whole or not there, so a run that was stopped at any moment goes on from the last of them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from passes.errors import InputError
from sgfx.training.history import History
from sgfx.training.loading import Data
from sgfx.training.schedules import Schedule

if TYPE_CHECKING:
    from sgfx.pruner import Step

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Phase:
    """One training: the options of `sgfx.Trainer`.

    Attributes:
        epochs: passes over the training data, or None where `iterations` says how long.
        lr: base learning rate.
        schedule: of the learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty.
        iterations: batches after which it ends.
        options: any other options of `sgfx.Trainer`, such as ``{"ema": 0.999, "clip_norm": 5.0}``.
    """

    epochs: int | None
    lr: float
    schedule: Schedule = "constant"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    iterations: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that it ends.

        Raises:
            InputError: it says neither how many epochs nor how many iterations.
        """
        if self.epochs is None and self.iterations is None:
            raise InputError("a phase needs epochs or iterations: both are None")

    def arguments(self) -> dict[str, Any]:
        """Keywords for `sgfx.Trainer`."""
        return {
            "epochs": self.iterations if self.epochs is None else self.epochs,  # an epoch has a batch at least
            "lr": self.lr,
            "schedule": self.schedule,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "iterations": self.iterations,
            **self.options,
        }


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """What a recipe made.

    Attributes:
        model: the trained model, lowered.
        steps: the pruning steps and what the training after each did.
        history: what the last phase did.
    """

    model: M
    steps: tuple[tuple[Step, History], ...]
    history: History


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed and trained; see the module.

    Attributes:
        name: its name.
        batch_size: what its learning rates are made for, over all processes; data loaders come from the caller.
        groups: per layer, where `run` is not told otherwise.
        step: share of each layer's connections that is pruned per step, or None to prune at once.
        local: the training after each step; None without steps.
        last: the training of the lowered model, or of the dense one where nothing is compressed.
        compresses: whether it compresses at all.
    """

    name: str
    batch_size: int
    groups: int
    step: float | None
    local: Phase | None
    last: Phase
    compresses: bool = True

    def __post_init__(self) -> None:
        """Check that steps and their training come together.

        Raises:
            InputError: there is one without the other.
        """
        if (self.step is None) != (self.local is None):
            raise InputError(f"recipe {self.name!r} has step={self.step!r} and local={self.local!r}: give both or none")

    def run(
        self,
        model: M,
        train_data: Data,
        val_data: Data | None = None,
        *,
        teacher: nn.Module | None = None,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = True,
        seed: int = 0,
        **compression: Any,
    ) -> Outcome[M]:
        """Compress a trained model and train it.

        Args:
            model: the dense model; it is not changed, except by a recipe that compresses nothing.
            train_data: as `sgfx.Trainer` takes it.
            val_data: the same.
            teacher: as `sgfx.Trainer` takes it, such as `model` itself.
            folder: where all of it is kept; see the module.
            resume: go on with what is in `folder`, to the same weights as a run that was never interrupted.
            progress: show progress bars.
            seed: of training. Each phase has a seed of its own that follows from it.
            compression: the options of `sgfx.compile`: `ratio` or `budget`, `groups`, `calibration`, `ignore`, …. With
                steps, a budget decides to which ratio each layer goes, and kept weights are calibrated, if at all,
                after the last step.

        Raises:
            InputError: (a ValueError) an option is out of range or doesn't suit the recipe; a folder holds a run
                already, or the run of another model or other options.
            FloatingPointError: the loss became NaN; see `sgfx.Trainer.fit`.
        """
        from sgfx.training.running import Run  # which needs the compiler; recipes themselves are light

        run = Run(
            self,
            model,
            train_data,
            val_data,
            {"groups": self.groups, **compression} if self.compresses else compression,
            {"teacher": teacher, "progress": progress},
            seed=seed,
            folder=None if folder is None else Path(folder),
            resume=resume,
        )
        small = run.compressed()
        history = run.train("global", small, self.last, 0)
        run.finish(small, history)
        return Outcome(small, tuple(run.steps), history)


_CIFAR = Phase(epochs=200, lr=0.01, schedule=(100, 150))
_IMAGENET = Phase(epochs=90, lr=0.01, schedule=(30, 60))
_DETECTOR = Phase(epochs=26, lr=0.005, schedule=(16, 22), options={"task": "detection"})
_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("cifar-baseline", 64, 8, None, None, Phase(200, lr=0.1, schedule=(100, 150)), compresses=False),
        Recipe("cifar-local-global", 64, 8, 0.05, Phase(4, lr=0.001), _CIFAR),
        Recipe("cifar-global", 64, 8, None, None, _CIFAR),
        Recipe("imagenet-local-global", 128, 16, 0.1, Phase(20, lr=0.0001), _IMAGENET),
        Recipe("imagenet-global", 128, 16, None, None, _IMAGENET),
        Recipe("detection-baseline", 4, 16, None, None, _DETECTOR, compresses=False),
        Recipe("detection-global", 4, 16, None, None, replace(_DETECTOR, epochs=7, schedule=(4, 6))),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        InputError: there is none; says which are near, and which there are.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(str(name), _RECIPES)
        meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise InputError(f"unknown recipe {name!r}{meant} There are {', '.join(_RECIPES)}")
    return _RECIPES[name]
