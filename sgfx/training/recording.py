"""What a run leaves in its folder, and how it goes on from there.

After an epoch the files are written in this order: the best weights, the log, the tracker's, the checkpoint. Whatever
was written before a checkpoint came to be is written again, the same, by who goes on from the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.errors import InputError
from sgfx.training.checkpoints import KIND, check_checkpoint
from sgfx.training.history import EpochRecord
from sgfx.training.loading import Source
from sgfx.training.loop import Loop
from sgfx.training.position import Position
from sgfx.training.run_folder import RunFolder, write_plain
from sgfx.training.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

BEST = "weights"


class Recorder:
    """Keeps the records of a run, and its files where it has a folder.

    Args:
        folder: of the run, or None.
        resume: whether to go on from a checkpoint that is there.
        settings: of the run.
        accelerator: knows the other processes; the main one writes.
        train: the training data.
        validated: whether there are validation data.

    Attributes:
        records: of the epochs that are over.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        resume: bool,
        settings: Settings,
        accelerator: Accelerator,
        train: Source,
        validated: bool,
    ) -> None:
        """Nothing is read or written yet."""
        self.records: list[EpochRecord] = []
        self._folder, self._resume, self._settings, self._accelerator = folder, resume, settings, accelerator
        self._options = settings.plain() | {"batches": len(train), "validated": validated}
        self._train = train
        self._loop: Loop | None = None
        self._found: dict[str, Any] | None = None
        self._tried = False
        self._saved: str | None = None

    def check(self, model: nn.Module) -> None:
        """Read the checkpoint to go on from, and refuse it if it is another run's; nothing is changed.

        Raises:
            InputError: it is, or the folder holds a run and this one is not to go on from it.
        """
        if self._folder is None:
            return
        self._folder.check(self._resume)
        self._found = self._folder.read() if self._resume else None
        if self._found is not None:
            processes = self._accelerator.num_processes
            check_checkpoint(self._found, self._folder.last, model, self._options, processes)

    @contextmanager
    def recording(self, loop: Loop) -> Iterator[None]:
        """Go on from the checkpoint; then say in errors which one was the last, and close the tracker."""
        self._loop = loop
        if self._folder is not None:
            self._accelerator.wait_for_everyone()  # all have looked
            if self._accelerator.is_main_process:
                self._folder.make()
        if self._found is not None:
            self._go_on(loop, self._found)
        if self._settings.tracker is not None:
            start = {self._settings.tracker: {"purge_step": loop.position.epoch}}
            self._accelerator.init_trackers(self._settings.tracker, init_kwargs=start)
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}{self._last_good()}") from None
        except KeyboardInterrupt as interrupt:
            if self._saved is not None:
                interrupt.add_note(f"sgfx: training was interrupted{self._last_good()}; resume=True goes on from there")
            raise
        finally:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def after_step(self) -> None:
        """Make a checkpoint, if it is time."""
        every, position = self._settings.checkpoint_steps, self._position
        if every is not None and position.steps % every == 0 and self._train.is_loader:
            self._save()

    def after_epoch(self, record: EpochRecord) -> None:
        """Note an epoch, and write all files."""
        self.records.append(record)
        self._judge(record)
        if self._folder is None:
            return
        if self._accelerator.is_main_process:
            self._folder.write_log(each.row() for each in self.records)
        if self._settings.tracker is not None:
            self._accelerator.log({k: v for k, v in record.row().items() if k != "epoch"}, step=record.epoch)
        self._save()

    @property
    def _position(self) -> Position:
        return self._running.position

    @property
    def _running(self) -> Loop:
        assert self._loop is not None
        return self._loop

    def _judge(self, record: EpochRecord) -> None:
        """Keep the best weights, and stop where they don't get better."""
        position, loop = self._position, self._running
        result = record.val.get(loop.task.best)
        if result is not None and (position.best is None or result > position.best[0]):
            position.best = (result, record.epoch)
            if self._folder is not None and self._accelerator.is_main_process:
                model = loop.model if loop.averaged is None else loop.averaged.module
                write_plain(self._folder.best, BEST, {"model": model.state_dict(), **record.row()})
        patience = self._settings.patience
        if patience is not None and position.best is not None and record.epoch - position.best[1] >= patience:
            position.stopped = True

    def _save(self) -> None:
        """Write the checkpoint: all processes bring their part, the main one writes.

        Raises:
            FloatingPointError: a weight is not finite; the checkpoint of before stays.
        """
        loop, folder = self._running, self._folder
        if folder is None:
            return
        if not all(bool(torch.isfinite(x).all()) for x in loop.model.parameters() if x.is_floating_point()):
            raise FloatingPointError(
                f"weights became NaN or infinite in step {loop.position.steps}, though losses were finite; try a "
                "smaller lr, or clip_norm"
            )
        processes = loop.gathered(loop.process_state())
        if self._accelerator.is_main_process:
            write_plain(folder.last, KIND, self._content(loop, processes), tried=self._tried)
            self._tried = True
        self._saved = _where(folder.last, loop.position)

    def _content(self, loop: Loop, processes: list[Any]) -> dict[str, Any]:
        scaler, averaged = self._accelerator.scaler, loop.averaged
        return {
            "model": loop.model.state_dict(),
            "model_ema": None if averaged is None else averaged.module.state_dict(),
            "averages": None if averaged is None else int(averaged.n_averaged),
            "optimizer": loop.optimizer.state_dict(),
            "scheduler": loop.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "options": self._options,
            "position": asdict(loop.position),
            "records": [record.to_dict() for record in self.records],
            "processes": processes,
        }

    def _go_on(self, loop: Loop, found: dict[str, Any]) -> None:
        """Take over a checkpoint that was checked."""
        folder = self._folder
        assert folder is not None
        try:  # first: what may still be refused
            position = Position(**found["position"])
            records = [EpochRecord(**record) for record in found["records"]]
            loop.load_process_state(found["processes"][self._accelerator.process_index])
            loop.optimizer.load_state_dict(found["optimizer"])
        except (TypeError, LookupError, AttributeError) as error:
            raise InputError(f"{folder.last} is damaged ({error}); bring back a copy, or begin anew") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder.last} was made with another optimizer: {error}") from error
        loop.model.load_state_dict(found["model"])
        if loop.averaged is not None:
            loop.averaged.module.load_state_dict(found["model_ema"])
            loop.averaged.n_averaged.fill_(found["averages"])
        loop.scheduler.load_state_dict(found["scheduler"])
        if self._accelerator.scaler is not None and found["scaler"]:
            self._accelerator.scaler.load_state_dict(found["scaler"])
        loop.position, self.records = position, records
        self._saved = _where(folder.last, loop.position)
        self._found = None
        if self._accelerator.is_main_process:
            folder.write_log(record.row() for record in self.records)

    def _last_good(self) -> str:
        return "" if self._saved is None else f"; the last good checkpoint is {self._saved}"


def _where(file: Path, position: Position) -> str:
    return f"{file} (epoch {position.epoch}, after {position.batch} batches of it, {position.steps} steps in all)"
