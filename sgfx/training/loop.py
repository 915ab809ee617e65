"""One run of the trainer: epochs of training and validation, and where it stands between any two steps."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.errors import InputError
from passes.infra import preserved_random_state
from sgfx.training.history import EpochRecord
from sgfx.training.loading import Source
from sgfx.training.modules import Wrapped, averages, preserved_modes
from sgfx.training.optimizing import make_optimizer, trained_parameters
from sgfx.training.position import Position, Sums
from sgfx.training.random_states import generators_in, global_state, seed_epoch, set_global_state, set_states, states_of
from sgfx.training.schedules import scheduler
from sgfx.training.settings import Settings
from sgfx.training.tasks.task import Lesson, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


class Loop:
    """The model, its optimizer, schedule and averages, and the data, as one process has them.

    Args:
        model: trained in place, on the accelerator's device.
        task: what it is trained for.
        settings: how.
        accelerator: knows the device, the precision and the other processes.
        train: the training data.
        val: the validation data, or None.
        after_step: called after every step of the optimizer but an epoch's last.

    Attributes:
        position: where it stands.
        averaged: the model with averaged weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Settings,
        accelerator: Accelerator,
        train: Source,
        val: Source | None,
        after_step: Callable[[], None],
    ) -> None:
        """Make what is needed beside the model; it is moved, and otherwise as it was."""
        self.model, self.task, self._settings, self._accelerator = model, task, settings, accelerator
        self._train_data, self._val_data, self._after_step = train, val, after_step
        s = settings
        model.to(accelerator.device)
        self._parameters = trained_parameters(model)
        own = make_optimizer(model, s.optimizer, s.lr, s.momentum, s.weight_decay, s.decay_norms)
        self.scheduler = scheduler(own, s.schedule, s.epochs, s.warmup)  # type: ignore[arg-type]
        self.optimizer = accelerator.prepare_optimizer(own)
        self.averaged = averages(model, s.ema) if s.ema is not None else None
        # A module of ours: accelerate's `prepare` replaces the forward of what it is given, and leaves marks on it.
        self._wrapped: nn.Module = Wrapped(model)
        if accelerator.num_processes > 1:
            self._wrapped = accelerator.prepare_model(self._wrapped)
        self.position = Position()
        self._sums = Sums(task.meter())
        self._before_epoch: dict[str, Any] = train.states()
        self._resumed: dict[str, Any] | None = None

    def process_state(self) -> dict[str, Any]:
        """What this process has by itself: random states, and the sums of the epoch that runs."""
        running = self.position.batch > 0
        return {
            "random": global_state() if running else None,
            "data": self._before_epoch if running else self._train_data.states(),
            "val": {} if self._val_data is None else self._val_data.states(),
            "transform": states_of(generators_in(self._settings.transform)),
            "sums": self._sums.state() if running else None,
        }

    def load_process_state(self, state: dict[str, Any]) -> None:
        """Go on from what `process_state` gave, in the position that belongs to it."""
        if self._val_data is not None:  # first: a generator may be of both, and belongs to the begin of the epoch then
            self._val_data.set_states(state["val"])
        self._train_data.set_states(state["data"])
        set_states(generators_in(self._settings.transform), state["transform"])
        self._resumed = state if state["random"] is not None else None

    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        position, most = self.position, self._settings.iterations
        ended = most is not None and position.batches >= most
        return ended or position.stopped or position.epoch > self._settings.epochs

    def epoch(self) -> EpochRecord:
        """Go on to the end of the epoch; the position is then that of the next."""
        position, lr = self.position, float(self.optimizer.param_groups[0]["lr"])
        self._train()
        self._agree()
        sums = self.gathered(self._sums.state())
        losses: Counter[str] = Counter()
        for each in sums:
            losses.update(each["losses"])
        count = sum(each["examples"] for each in sums)
        means = {name: total / count for name, total in losses.items()}
        record = EpochRecord(
            position.epoch,
            lr,
            sum(means.values()),
            self._sums.meter.results([each["meter"] for each in sums]),
            {} if self._val_data is None else self._validate(self._val_data),
            means if len(means) > 1 else {},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected call of `lr_scheduler.step"
            )  # the steps were made before a kill
            self.scheduler.step()
        position.epoch, position.batch = position.epoch + 1, 0
        return record

    def _train(self) -> None:
        """Train to the end of the epoch, or to the last iteration."""
        position, accumulate = self.position, self._accelerator.gradient_accumulation_steps
        self.optimizer.zero_grad()  # of whatever the caller computed before
        pending = 0  # batches whose gradients wait for a step
        for number, raw, labels in self._begun():
            inputs, targets = self._transformed(raw, labels)
            if (position.epoch, number) == (1, 1):
                self._rehearse(inputs)
            pending += 1
            with self._apart(alone=pending < accumulate):
                lesson = self.task.lesson(self.model, self._call, inputs, targets)
                self._add(lesson, targets, number)
                self._accelerator.backward(torch.stack(list(lesson.losses.values())).sum())
            position.batch, position.batches = number, position.batches + 1
            if pending == accumulate:
                self._step()
                pending = 0
                if number != len(self._train_data) and not self.is_over():  # else the epoch's own is due
                    self._after_step()
            if self.is_over():
                break
        if pending:
            self._complete(accumulate / pending)
            self._step()

    def _begun(self) -> Iterator[tuple[int, Any, Any]]:
        """The batches of the epoch from where it stands, and the random state that belongs there."""
        position, resumed = self.position, self._resumed
        self._before_epoch = self._train_data.states()
        self._sums = Sums(self.task.meter())
        seed_epoch(self._settings.seed, position.epoch, self._accelerator.process_index)
        batches = self._train_data.batches(position.epoch, position.batch)
        if resumed is not None:
            self._resumed = None
            self._sums.load_state(resumed["sums"])
            set_global_state(resumed["random"])
        return batches

    def _rehearse(self, inputs: Any) -> None:
        with preserved_modes(self.model), torch.no_grad():
            self.model.eval()
            self.task.rehearse(self.model, self._call, inputs)

    def _transformed(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        transform = self._settings.transform
        if transform is None:
            return inputs, targets
        if targets is None:
            return transform(inputs), None
        made = transform(inputs, targets)
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise InputError(f"transform must give (inputs, targets) of a batch, not {type(made).__name__}")
        return made[0], made[1]

    def _call(self, *inputs: Any) -> Any:
        """Run the model as training does."""
        with self._accelerator.autocast():
            return self._wrapped(*inputs)

    def _add(self, lesson: Lesson, targets: Any, number: int) -> None:
        """Add up a batch; before its step, so that weights are still those of the last finite loss."""
        values = torch.stack([loss.detach() for loss in lesson.losses.values()])
        everywhere = self._accelerator.gather(values).tolist() if self._several else values.tolist()
        if not all(map(math.isfinite, everywhere)):
            wrong = next(value for value in everywhere if not math.isfinite(value))
            raise FloatingPointError(
                f"the loss became {wrong} in step {number} of epoch {self.position.epoch}; try an lr below "
                f"{self.optimizer.param_groups[0]['lr']:g}, another mixed_precision than 'fp16', and look for NaN in "
                "the inputs and in the model"
            )
        for name, value in zip(lesson.losses, values.tolist(), strict=True):
            self._sums.losses[name] += value * lesson.examples
        self._sums.examples += lesson.examples
        if targets is not None:
            self._sums.meter.update(lesson.outputs, targets)

    def _apart(self, alone: bool) -> AbstractContextManager[Any]:
        """Let gradients of this process stay its own, where the step comes later."""
        return self._accelerator.no_sync(self._wrapped) if alone and self._several else nullcontext()

    def _complete(self, factor: float) -> None:
        """Make the mean of the gradients of fewer batches than a step is made of; no process knew of the others'."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
                if self._several:
                    parameter.grad.copy_(self._accelerator.reduce(parameter.grad, "mean"))

    def _step(self) -> None:
        if self._settings.clip_norm is not None:
            self._accelerator.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step: a trained model should not carry its gradients about
        self.position.steps += 1
        if self.averaged is not None and not self.optimizer.step_was_skipped:
            self.averaged.update_parameters(self.model)

    def _agree(self) -> None:
        """Let all processes have the buffers of the main one: each has updated its own since its last forward."""
        if self._several:
            from accelerate.utils import broadcast

            models = [self.model] if self.averaged is None else [self.model, self.averaged]
            for buffer in (each for model in models for each in model.buffers()):
                buffer.copy_(broadcast(buffer))

    def _validate(self, data: Source) -> dict[str, float]:
        """What is measured in eval mode, of the averages where there are some."""
        model = self.model if self.averaged is None else self.averaged.module
        meter = self.task.meter()

        def call(*inputs: Any) -> Any:
            with self._accelerator.autocast():
                return model(*inputs)

        # Training must not depend on whether there is validation. And no_grad rather than inference_mode: a tensor
        # that a layer keeps from here must still serve in training.
        with preserved_random_state(), preserved_modes(model), torch.no_grad():
            model.eval()
            for _, inputs, targets in data.batches(self.position.epoch):
                made = (self.task.outputs(call, inputs, targets), targets)
                meter.update(*(self._from_all(made) if self._several else made))
        return meter.results([meter.state()])

    def _from_all(self, made: tuple[Any, Any]) -> tuple[Any, Any]:
        """Outputs and targets of all processes, each example once."""
        from accelerate.utils import send_to_device

        if not self.task.gathers_objects:
            outputs, targets = self._accelerator.gather_for_metrics(made)
        else:
            own = send_to_device(list(zip(*made, strict=True)), "cpu")
            outputs, targets = zip(*self._accelerator.gather_for_metrics(own, use_gather_object=True), strict=True)
        return outputs, targets

    @property
    def _several(self) -> bool:
        return bool(self._accelerator.num_processes > 1)

    def gathered(self, state: Any) -> list[Any]:
        """Plain data of every process, in all of them."""
        from accelerate.utils import gather_object

        return list(gather_object([state]))
