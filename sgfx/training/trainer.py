"""`sgfx.Trainer`: a thin training loop for classifiers, on Hugging Face accelerate.

It trains the model in place and leaves nothing else behind: no wrapper on the model, its modules in their modes, the
global random state as it was. Of accelerate it takes the device, autocast and the scaling of fp16 gradients. The model
is not handed to accelerate's ``prepare``, which replaces ``forward``: its ``unwrap_model`` would keep an instance
attribute, lose a user's own decorators on ``forward``, and leave a mark that makes the next ``prepare`` do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from passes.errors import InputError
from passes.infra.random_state import preserved_random_state
from sgfx.training.accelerator import Precision, own_accelerator
from sgfx.training.history import EpochRecord, History
from sgfx.training.schedules import Schedule, checked_schedule, learning_rate
from sgfx.training.teacher import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

Data: TypeAlias = Iterable[Any]  # of batches (inputs, targets), checked as they come


class Trainer:
    """Trains a classifier in place by stochastic gradient descent with momentum.

    ::

        history = sgfx.Trainer(model, train_loader, val_loader, epochs=200, lr=0.1, schedule=(100, 150)).fit()
        history.epochs[-1].val_top1

    Training runs in one process on one device, a GPU where there is one. In a process that a launcher such as torchrun
    started with others it refuses to.

    Args:
        model: maps inputs to logits ``[N, classes]``. Parameters with ``requires_grad=False`` are left alone. If the
            model is in train mode, modules in eval mode (frozen norms) stay in it; if it is in eval mode, all of it
            trains.
        train_data: a DataLoader or any iterable of batches ``(inputs, targets)`` that can be iterated once per epoch;
            `targets` are class indices ``[N]``, int64.
        val_data: the same for validation, after each epoch; it has no influence on training.
        epochs: passes over `train_data`, at least 1.
        lr: base learning rate, above 0.
        teacher: a model whose outputs, and those of whose blocks, are the targets of training, in place of the labels,
            such as the dense model that `model` was compiled from; see `sgfx.distill`. Labels are then only counted
            against, and the batches of `train_data` may also be inputs alone.
        schedule: ``"constant"``, ``"cosine"`` (by epoch), or the epochs after which `lr` is divided by ten:
            ``(100, 150)``.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty on every trained parameter, at least 0.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        mixed_precision: ``"bf16"``, ``"fp16"`` (on a GPU) or None; parameters keep their type.
        seed: of everything random in here, shuffling DataLoaders included, unless they have a ``generator`` of their
            own. The same seed and data give the same weights, on the CPU bit for bit.
        progress: show progress bars.

    Attributes:
        model: the model, the same object.
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
        schedule: Schedule = "constant",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        mixed_precision: Precision | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Check the options; see the class. Nothing runs before `fit`.

        Raises:
            InputError: (a ValueError) a value is out of range; says which are allowed.
            TypeError: a value is of the wrong type.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self._train_data = _checked_data(train_data, "train_data")
        self._val_data = None if val_data is None else _checked_data(val_data, "val_data")
        self._epochs = int(_number(epochs, "epochs", Integral, 1, math.inf))
        self._lr = float(_number(lr, "lr", Real, 0, math.inf))
        if self._lr == 0:
            raise InputError("lr must be above 0: nothing is learnt at 0")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module, not {type(teacher).__name__}")
        self._teacher = None if teacher is None else Teacher(teacher)
        self._schedule = checked_schedule(schedule)
        self._momentum = float(_number(momentum, "momentum", Real, 0, 1))
        self._weight_decay = float(_number(weight_decay, "weight_decay", Real, 0, math.inf))
        self._label_smoothing = float(_number(label_smoothing, "label_smoothing", Real, 0, 1))
        if self._teacher is not None and self._label_smoothing:
            raise InputError("label_smoothing is of labels, and a teacher's outputs take their place: leave one out")
        self._precision = _checked_precision(mixed_precision)
        self._seed = int(_number(seed, "seed", Integral, 0, 2**32))
        self._progress = progress

    def fit(self) -> History:
        """Train, and return what each epoch did.

        The model is left on the device it was trained on. However training ends, by an error or Ctrl-C too, its modules
        are back in the modes they were in and the global random state of torch, numpy and Python is as before. Calling
        it again trains on, with the seed and the schedule from the start and no momentum.

        Raises:
            InputError: nothing to train, no batches, a batch or logits of another form than the class describes, or a
                precision or process setup that this machine or class has no support for.
            FloatingPointError: the loss became NaN or infinite; the weights are those before that step.
        """
        with (
            preserved_random_state(),
            own_accelerator(self._precision) as accelerator,
            _preserved_modes(self.model),
        ):
            from accelerate.utils import set_seed

            optimizer = accelerator.prepare_optimizer(self._optimizer())
            set_seed(self._seed)
            self.model.to(accelerator.device)
            if not self.model.training:
                self.model.train()
            records = []
            with tqdm(range(1, self._epochs + 1), unit="epoch", disable=not self._progress) as bar:
                for epoch in bar:
                    records.append(self._epoch(accelerator, optimizer, epoch))
                    bar.set_postfix({key: value for key, value in asdict(records[-1]).items() if value is not None})
        return History(tuple(records))

    def _optimizer(self) -> torch.optim.SGD:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("the model has nothing to train: no parameter with requires_grad=True; set it on some")
        return torch.optim.SGD(trained, lr=self._lr, momentum=self._momentum, weight_decay=self._weight_decay)

    def _epoch(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, epoch: int) -> EpochRecord:
        lr = learning_rate(self._schedule, self._lr, epoch, self._epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, train_top1 = self._train(accelerator, optimizer, epoch)
        val_top1 = None if self._val_data is None else self._validate(accelerator, self._val_data, epoch)
        return EpochRecord(epoch, lr, loss, train_top1, val_top1)

    def _train(
        self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, epoch: int
    ) -> tuple[float, float | None]:
        """One pass over the training data; returns mean loss and top-1."""
        total, correct, labelled, count = 0.0, 0, 0, 0
        optimizer.zero_grad()  # of whatever the caller computed before
        for step, inputs, targets in self._batches(self._train_data, "train_data", epoch, accelerator):
            if (epoch, step) == (1, 1) and self._teacher is not None:
                self._try_teacher(accelerator, inputs)
            logits, loss = self._loss(accelerator, inputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(  # before the step: the weights are still those of the last finite loss
                    f"the loss became {value} in step {step} of epoch {epoch}; try an lr below "
                    f"{optimizer.param_groups[0]['lr']:g}, another mixed_precision than 'fp16', and look for NaN in "
                    "the inputs and in the model"
                )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()  # after the step: a trained model should not carry its gradients about
            total += value * len(logits)
            count += len(logits)
            if targets is not None:
                correct += _hits(logits, targets)
                labelled += len(targets)
        return total / count, correct / labelled if labelled else None

    def _try_teacher(self, accelerator: Accelerator, inputs: Any) -> None:
        """Refuse a teacher with other outputs before training has moved anything, statistics of norms included."""
        with _preserved_modes(self.model), torch.no_grad():
            self.model.eval()
            self._loss(accelerator, inputs, None)

    def _validate(self, accelerator: Accelerator, data: Data, epoch: int) -> float:
        """Top-1 in eval mode."""
        correct, count = 0, 0
        # Loaders draw random numbers: training must not depend on whether there is validation. And no_grad rather than
        # inference_mode: a tensor that a layer keeps from here must still serve in training.
        with preserved_random_state(), _preserved_modes(self.model), torch.no_grad():
            self.model.eval()
            for _, inputs, targets in self._batches(data, "val_data", epoch, accelerator):
                correct += _hits(self._logits(accelerator, inputs, targets), targets)
                count += len(targets)
        return correct / count

    def _batches(self, data: Data, name: str, epoch: int, accelerator: Accelerator) -> Iterator[tuple[int, Any, Any]]:
        """Number, check and move the batches of one epoch; where labels are not needed, targets may be None."""
        from accelerate.utils import send_to_device

        step = 0
        with tqdm(data, desc=name, unit="batch", leave=False, disable=not self._progress) as bar:
            for step, batch in enumerate(bar, 1):
                if self._teacher is not None and name == "train_data" and _is_unlabelled(batch):
                    inputs = batch if isinstance(batch, Tensor) else batch[0]
                    yield step, send_to_device(inputs, accelerator.device), None
                    continue
                if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
                    kind = type(batch).__name__
                    given = f"{kind} of {len(batch)}" if isinstance(batch, tuple | list) else kind
                    raise InputError(
                        f"{name} must give batches (inputs, targets), targets being a tensor of class indices [N]; "
                        f"batch {step} of epoch {epoch} is a {given}: change the dataset or its collate_fn"
                    )
                inputs, targets = send_to_device(batch, accelerator.device)
                yield step, inputs, targets
        if step == 0:
            raise InputError(
                f"{name} gave no batches in epoch {epoch}: it is iterated once per epoch and must give the batches of "
                "(inputs, targets) anew each time; pass a DataLoader or a list (is the dataset empty, or drop_last on?)"
            )

    def _logits(self, accelerator: Accelerator, inputs: Any, targets: Tensor | None) -> Tensor:
        with accelerator.autocast():
            logits = self.model(inputs)
        fits = isinstance(logits, Tensor) and logits.dim() == 2
        if not fits or (targets is not None and targets.shape != logits.shape[:1]):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            labels = "inputs alone" if targets is None else list(targets.shape)
            raise InputError(
                f"the model must give logits [N, classes] for targets [N], but gave {given} for {labels}; "
                "targets are class indices, and a model with several outputs needs a wrapper that returns one"
            )
        # Half precision is too coarse for a loss.
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _loss(self, accelerator: Accelerator, inputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits, and how far they are from the labels or from the teacher."""
        if self._teacher is not None:
            return self._teacher.lesson(self.model, (inputs,), lambda: self._logits(accelerator, inputs, targets))
        logits = self._logits(accelerator, inputs, targets)
        return logits, F.cross_entropy(logits, cast(Tensor, targets), label_smoothing=self._label_smoothing)


@contextmanager
def _preserved_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back in its mode on leaving, whatever happened inside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_unlabelled(batch: Any) -> bool:
    """Whether a batch is inputs alone: a tensor, or a tuple or list of one."""
    return isinstance(batch, Tensor) or (isinstance(batch, tuple | list) and len(batch) == 1)


def _hits(logits: Tensor, targets: Tensor) -> int:
    return int((logits.argmax(dim=1) == targets).sum())


def _checked_data(data: Data, name: str) -> Data:
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches (inputs, targets), such as a DataLoader, not {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise InputError(
            f"{name} is a {type(data).__name__}, which runs dry after one epoch; pass a DataLoader or a list of batches"
        )
    return data


def _checked_precision(precision: Precision | None) -> Precision | None:
    if precision is not None and precision not in get_args(Precision):
        choices = " or ".join(map(repr, (*get_args(Precision), None)))
        raise InputError(f"mixed_precision must be {choices}, not {precision!r}")
    return precision


def _number(value: float, name: str, kind: type[Integral | Real], least: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an integer' if kind is Integral else 'a number'}, not {value!r}")
    if not least <= value < below:  # false for NaN too
        raise InputError(f"{name} must be at least {least} and below {below}, not {value}")
    return value
