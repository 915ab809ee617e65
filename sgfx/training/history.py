"""What training did, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: its number, from 1.
        lr: its learning rate.
        loss: mean training loss per example, label smoothing included.
        train: what the task measures on the training examples, each by the model as it was then, such as
            ``{"top1": 0.92, "top5": 0.99}``, shares in [0, 1]; empty without labels.
        val: the same for the validation data after the epoch (of the averaged weights, where there are averages); empty
            without such data.
        losses: the mean of each loss by its name, where a task has several that are summed.
    """

    epoch: int
    lr: float
    loss: float
    train: Mapping[str, float] = field(default_factory=dict)
    val: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def train_top1(self) -> float | None:
        """Share of the training examples classified correctly, or None without labels."""
        return self.train.get("top1")

    @property
    def val_top1(self) -> float | None:
        """Share of the validation examples classified correctly, or None without such data."""
        return self.val.get("top1")

    @property
    def val_top5(self) -> float | None:
        """Share of the validation examples whose class is among the five best; None for five classes or fewer."""
        return self.val.get("top5")

    def row(self) -> dict[str, float]:
        """The record as one flat row, as in ``log.csv``: ``epoch, lr, loss, …, train_top1, …, val_top1, …``."""
        row = {"epoch": self.epoch, "lr": self.lr, "loss": self.loss} | dict(self.losses)
        for part, values in (("train", self.train), ("val", self.val)):
            row |= {f"{part}_{name}": value for name, value in values.items()}
        return row

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data; ``EpochRecord(**data)`` makes it again."""
        return asdict(self)


@dataclass(frozen=True)
class History:
    """What `Trainer.fit` returns: one record for each epoch, in order."""

    epochs: tuple[EpochRecord, ...]
