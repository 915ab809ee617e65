"""What a run was asked for, checked, and as plain data that a checkpoint can be compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, get_args

from passes.errors import InputError
from passes.options import checked_integer, checked_number
from sgfx.training.accelerator import Precision
from sgfx.training.optimizing import MakeOptimizer
from sgfx.training.schedules import Schedule, checked_schedule

TRACKERS = ("tensorboard",)


@dataclass(frozen=True)
class Settings:
    """The options of `sgfx.Trainer` that are numbers, names or functions; see there."""

    epochs: int
    lr: float
    task: str
    schedule: Schedule
    ema: float | None
    optimizer: MakeOptimizer | None
    momentum: float
    weight_decay: float
    decay_norms: bool
    loss: Callable[..., Any] | None
    label_smoothing: float
    transform: Callable[..., Any] | None
    warmup: int
    accumulate: int
    clip_norm: float | None
    iterations: int | None
    patience: int | None
    checkpoint_steps: int | None
    mixed_precision: Precision | None
    tracker: str | None
    seed: int

    def __post_init__(self) -> None:
        """Check every value by itself.

        Raises:
            InputError: (a ValueError) a value is out of range; says which are allowed.
            TypeError: a value is of the wrong type.
        """
        for name, checked in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, checked(value, name))
        for name in ("optimizer", "loss", "transform"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise TypeError(f"{name} must be callable, not {getattr(self, name)!r}")
        object.__setattr__(self, "schedule", checked_schedule(self.schedule, self.epochs, self.warmup))
        _check_choice(self.mixed_precision, "mixed_precision", get_args(Precision))
        _check_choice(self.tracker, "tracker", TRACKERS)
        if self.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise InputError("tracker='tensorboard' needs the package tensorboard: pip install tensorboard")
        if self.loss is not None and self.label_smoothing:
            raise InputError("label_smoothing is of the loss that loss= takes the place of: leave one out")

    def plain(self) -> dict[str, Any]:
        """All of it but what has no influence on the weights, as plain data; functions by their names."""
        return {
            each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in _WITHOUT_INFLUENCE
        }


_WITHOUT = "; None is without"
_NUMBERS: dict[str, Callable[[object, str], float]] = {
    "epochs": partial(checked_integer, least=1),
    "lr": partial(checked_number, above=0),
    "ema": partial(checked_number, above=0, below=1, hint=_WITHOUT),
    "momentum": partial(checked_number, least=0, below=1),
    "weight_decay": partial(checked_number, least=0),
    "label_smoothing": partial(checked_number, least=0, below=1),
    "warmup": partial(checked_integer, least=0),
    "accumulate": partial(checked_integer, least=1),
    "clip_norm": partial(checked_number, above=0, hint=_WITHOUT),
    "iterations": partial(checked_integer, least=1, hint=_WITHOUT),
    "patience": partial(checked_integer, least=1, hint=_WITHOUT),
    "checkpoint_steps": partial(checked_integer, least=1, hint=_WITHOUT),
    "seed": partial(checked_integer, least=0, below=2**32),
}
_OPTIONAL = {"ema", "clip_norm", "iterations", "patience", "checkpoint_steps"}
_WITHOUT_INFLUENCE = {"tracker", "checkpoint_steps"}


def _check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise InputError(f"{name} must be {' or '.join(map(repr, (*choices, None)))}, not {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, partial):
        return f"{_plain(value.func)} with {[*value.args, *value.keywords.items()]}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return list(value) if isinstance(value, tuple) else value
