"""What training did, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: its number, from 1.
        lr: its learning rate.
        loss: mean training loss per example, label smoothing included.
        train_top1: share of training examples classified correctly, in [0, 1], each by the model as it was then, or
            None without labels.
        val_top1: the same for the validation data after the epoch, or None without such data.
    """

    epoch: int
    lr: float
    loss: float
    train_top1: float | None
    val_top1: float | None


@dataclass(frozen=True)
class History:
    """What `Trainer.fit` returns: one record for each epoch, in order."""

    epochs: tuple[EpochRecord, ...]
