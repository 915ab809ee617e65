"""`PruningCallback` for Lightning: the paper's local + global scheme inside one ``fit``."""

from __future__ import annotations

import math
from typing import Any

from passes.errors import InputError
from sgfx.integrations.callback import ScheduledPruning

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        "sgfx.integrations.lightning needs Lightning: pip install 'sgfx[integrations]' (or lightning alone)"
    ) from error


class PruningCallback(ScheduledPruning, Callback):
    """Prunes the model of a ``Trainer.fit`` in place, step by step, lowers it, and goes on; see `ScheduledPruning`.

    ::

        callback = PruningCallback(module="model", ratio=0.8, step=0.1, every_epochs=4)
        lightning.Trainer(max_epochs=200, callbacks=[callback]).fit(module, loader)

    Steps are those of ``trainer.global_step``. Any checkpoint of the run goes on as ever, with ``fit(…, ckpt_path=…)``
    on a fresh dense model and the same callback. Optimizers and schedulers stay: at lowering, the new weights take the
    places of the old.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put masked layers into the network, before a checkpoint is restored and optimizers are made.

        Raises:
            InputError: the model, an option, the strategy or another callback does not allow it; says why.
        """
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise InputError(
                f"PruningCallback can't work under {type(trainer.strategy).__name__}, which keeps the parameters that "
                "it found at the start, and lowering makes new ones. Use one device, or prune in a loop of your own"
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, WeightAveraging | StochasticWeightAveraging):
                raise InputError(
                    f"{type(other).__name__} averages a copy of the model that it makes at the start, which knows "
                    "neither masks nor lowered weights: average in a second fit, of the lowered model"
                )
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise InputError("the model is compiled by torch: prune first, and compile the lowered model")
        self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where the run is too short."""
        if self._when.unit == "steps":
            end = float(trainer.estimated_stepping_batches)
        else:
            end = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
        self._begin(end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune and lower where it is due."""
        now = trainer.global_step if self._when.unit == "steps" else trainer.current_epoch
        self._continue(now, trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where pruning is not complete."""
        self._finish()
