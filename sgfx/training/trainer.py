"""`sgfx.Trainer`: a training loop that can be left alone, on Hugging Face accelerate.

It trains the model in place and leaves nothing else behind: no wrapper on the model, its modules in their modes, the
global random state as it was. Of accelerate it takes devices, autocast, the scaling of fp16 gradients, and all that
several processes need. What it does is in the files beside this one: an epoch in `loop`, data in `loading`, files in
`run_folder` and `checkpoints`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm import tqdm

from passes.errors import InputError
from passes.infra import preserved_random_state
from sgfx.training.accelerator import Precision, own_accelerator
from sgfx.training.history import History
from sgfx.training.loading import Data, Source, checked_data
from sgfx.training.loop import Loop
from sgfx.training.modules import preserved_modes
from sgfx.training.optimizing import MakeOptimizer, trained_parameters
from sgfx.training.recording import Recorder
from sgfx.training.run_folder import RunFolder
from sgfx.training.schedules import Schedule
from sgfx.training.settings import Settings
from sgfx.training.tasks.classification import Classification
from sgfx.training.tasks.detection import Detection
from sgfx.training.tasks.precision import check_installed
from sgfx.training.tasks.task import Task
from sgfx.training.teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator

TASKS = ("classification", "detection")


class Trainer:
    """Trains a model in place by stochastic gradient descent with momentum, or an optimizer of your own.

    ::

        trainer = sgfx.Trainer(model, train_loader, val_loader, epochs=200, lr=0.1, schedule=(100, 150), folder="run")
        trainer.fit().epochs[-1].val_top1

    Training runs on a GPU where there is one. Started by ``accelerate launch`` or ``torchrun`` it runs in all their
    processes: every one trains on its share of each DataLoader, and the batch of a step is those of all of them.

    Args:
        model: maps inputs to logits ``[N, classes]``. Parameters with ``requires_grad=False`` are left alone. If the
            model is in train mode, modules in eval mode (frozen norms) stay in it; if it is in eval mode, all of it
            trains.
        train_data: a DataLoader or any iterable of batches ``(inputs, targets)`` that can be iterated once per epoch;
            `targets` are class indices ``[N]``, int64, or probabilities ``[N, classes]``.
        val_data: the same for validation, after each epoch; it has no influence on the weights.
        epochs: passes over `train_data`, at least 1.
        lr: base learning rate, above 0.
        teacher: a model whose outputs, and those of whose blocks, are the targets of training, in place of the labels,
            such as the dense model that `model` was compiled from; see `sgfx.distill`. Labels are then only counted
            against, and the batches of `train_data` may also be inputs alone.
        task: what the model is trained for: ``"classification"``, or ``"detection"``: `model` is a detector as
            torchvision has them, batches are ``(images, targets)``, its losses are summed, and the mean average
            precision is measured (`docs/detection.md`).
        schedule: ``"constant"``, ``"cosine"`` (by epoch), or the epochs after which `lr` is divided by ten:
            ``(100, 150)``.
        folder: where the run is kept: ``last.pt``, a checkpoint to go on from; ``best.pt``, the weights of the epoch
            that was best on `val_data`; ``log.csv``. All machines of a run must see it.
        resume: go on from the checkpoint in `folder`, where there is one: the finished weights are those of a run that
            was never interrupted, bit for bit. Model, data and options must be made as they were then.
        ema: decay of an exponential moving average of weights and buffers, in (0, 1), such as 0.9998. It is then what
            is validated, and what ``best.pt`` holds; `averaged` has it.
        progress: show progress bars, in the main process.
        optimizer: called as ``optimizer(groups, lr=lr)``, as torch's classes are: ``torch.optim.AdamW``, or
            ``functools.partial(torch.optim.SGD, nesterov=True, momentum=0.9)``. `groups` have their `weight_decay`.
        momentum: of SGD, where `optimizer` is None, in [0, 1).
        weight_decay: L2 penalty on trained parameters, at least 0.
        decay_norms: whether norms, biases and all parameters of one dimension have it too.
        loss: of logits ``[N, classes]`` and targets, a scalar, in place of cross-entropy.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        transform: changes a batch on the device, before training: ``transform(inputs, targets)`` gives both, such as
            torchvision's ``v2.MixUp(num_classes=10)``.
        warmup: epochs in which `lr` goes up in equal steps first.
        accumulate: batches whose gradients make one step.
        clip_norm: the largest norm that the gradient of a step may have; a larger one is scaled down.
        iterations: end after so many batches, though the epochs are not over.
        patience: end after so many epochs in which the result on `val_data` was not better than the best before.
        checkpoint_steps: make a checkpoint after every so many steps too, not only after every epoch; of a DataLoader.
        mixed_precision: ``"bf16"``, ``"fp16"`` (on a GPU) or None; parameters keep their type.
        tracker: ``"tensorboard"`` for its logs in ``folder/tensorboard``.
        seed: of everything random in here, shuffling DataLoaders included, unless they have a ``generator`` of their
            own. The same seed and data give the same weights, on the CPU bit for bit.

    Attributes:
        model: the model, the same object.
        averaged: after `fit` with `ema`, a copy of the model with the averages; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Data,
        val_data: Data | None = None,
        *,
        epochs: int,
        lr: float,
        teacher: nn.Module | None = None,
        task: str = "classification",
        schedule: Schedule = "constant",
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        ema: float | None = None,
        progress: bool = True,
        optimizer: MakeOptimizer | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay_norms: bool = True,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
        transform: Callable[..., Any] | None = None,
        warmup: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        iterations: int | None = None,
        patience: int | None = None,
        checkpoint_steps: int | None = None,
        mixed_precision: Precision | None = None,
        tracker: str | None = None,
        seed: int = 0,
    ) -> None:
        """Check the options; see the class. Nothing runs before `fit`.

        Raises:
            InputError: (a ValueError) a value is out of range, or two contradict each other; says what is allowed.
            TypeError: a value is of the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, not {type(teacher).__name__}")
        self.model = model
        self.averaged: nn.Module | None = None
        self._train_data = checked_data(train_data, "train_data")
        self._val_data = None if val_data is None else checked_data(val_data, "val_data")
        self._settings = Settings(
            epochs=epochs,
            lr=lr,
            task=task,
            schedule=schedule,
            ema=ema,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            decay_norms=decay_norms,
            loss=loss,
            label_smoothing=label_smoothing,
            transform=transform,
            warmup=warmup,
            accumulate=accumulate,
            clip_norm=clip_norm,
            iterations=iterations,
            patience=patience,
            checkpoint_steps=checkpoint_steps,
            mixed_precision=mixed_precision,
            tracker=tracker,
            seed=seed,
        )
        self._task = _make_task(self._settings, teacher, val_data is not None)
        self._folder = None if folder is None else RunFolder(folder)
        self._resume, self._progress = resume, progress
        _check_together(self._settings, self._folder, resume, self._train_data, self._val_data)

    def fit(self) -> History:
        """Train, and return what each epoch did.

        The model is left on the device it was trained on. However training ends, by an error or Ctrl-C too, its modules
        are back in the modes they were in and the global random state of torch, numpy and Python is as before. Calling
        it again trains on, with the seed and the schedule from the start and no momentum.

        Raises:
            InputError: nothing to train, no batches, a batch or logits of another form than the class describes, a
                precision or process setup that this machine or class has no support for, a folder that holds a run
                already, or the checkpoint of another model or other options. Nothing has changed then, but by steps
                that were made before.
            FloatingPointError: the loss became NaN or infinite; the weights are those before that step. Says which
                checkpoint was the last good one.
            OSError: the disk is full or the like; the last checkpoint is whole.
        """
        options: dict[str, Any] = {}
        if self._settings.tracker is not None and self._folder is not None:
            options = {"log_with": self._settings.tracker, "project_dir": self._folder.path}
        trained_parameters(self.model)
        with (
            preserved_random_state(),
            own_accelerator(
                self._settings.mixed_precision, accumulate=self._settings.accumulate, **options
            ) as accelerator,
            preserved_modes(self.model),
            ExitStack() as stack,
        ):
            train = self._source(self._train_data, "train_data", accelerator, stack)
            val = None if self._val_data is None else self._source(self._val_data, "val_data", accelerator, stack)
            recorder = Recorder(self._folder, self._resume, self._settings, accelerator, train, val is not None)
            recorder.check(self.model)
            if not self.model.training:
                self.model.train()
            loop = Loop(self.model, self._task, self._settings, accelerator, train, val, recorder.after_step)
            self.averaged = None if loop.averaged is None else loop.averaged.module
            stack.enter_context(recorder.recording(loop))
            return self._epochs(loop, recorder, accelerator)

    def _epochs(self, loop: Loop, recorder: Recorder, accelerator: Accelerator) -> History:
        shown = self._progress and accelerator.is_main_process
        done = loop.position.epoch - 1
        with tqdm(total=self._settings.epochs, initial=done, unit="epoch", disable=not shown) as bar:
            while not loop.is_over():
                record = loop.epoch()
                recorder.after_epoch(record)
                bar.set_postfix(record.row())
                bar.update()
        return History(tuple(recorder.records))

    def _source(self, data: Data, name: str, accelerator: Accelerator, stack: ExitStack) -> Source:
        source = Source(data, name, self._task, accelerator, seed=self._settings.seed, shown=self._progress)
        stack.callback(source.close)
        return source


def _make_task(settings: Settings, teacher: nn.Module | None, validated: bool) -> Task:
    if settings.task not in TASKS:
        raise InputError(f"unknown task {settings.task!r}; choose {' or '.join(map(repr, TASKS))}")
    given = {"loss": settings.loss is not None, "label_smoothing": settings.label_smoothing, "teacher": teacher}
    if settings.task == "detection":
        if name := next((name for name, value in given.items() if value), None):
            hint = ": sgfx.distill trains towards a dense detector" if name == "teacher" else ""
            raise InputError(f"{name} is of task='classification', and detectors have losses of their own{hint}")
        if validated:
            check_installed()
        return Detection()
    if teacher is not None and (settings.label_smoothing or settings.loss is not None):
        name = "loss" if settings.loss is not None else "label_smoothing"
        raise InputError(f"{name} is of labels, and a teacher's outputs take their place: leave one out")
    return Classification(settings.loss, settings.label_smoothing, None if teacher is None else Teacher(teacher))


def _check_together(
    settings: Settings, folder: RunFolder | None, resume: bool, train_data: Data, val_data: Data | None
) -> None:
    """Refuse options that need another one, or that contradict each other."""
    if folder is None:
        for name, given in asdict(settings).items():
            if name in ("checkpoint_steps", "tracker") and given is not None:
                raise InputError(f"{name} writes files: give folder too")
        if resume:
            raise InputError("resume goes on from a checkpoint: give its folder too")
    elif getattr(train_data, "persistent_workers", False):
        raise InputError(
            "the workers of train_data outlive an epoch (persistent_workers=True), with random states that no "
            "checkpoint holds: leave that out, or folder"
        )
    if settings.patience is not None and val_data is None:
        raise InputError("patience waits for better results on val_data: give that too")
