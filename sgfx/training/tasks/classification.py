"""Classification: logits ``[N, classes]``, cross-entropy or a teacher, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import InputError
from sgfx.training.tasks.task import Call, Lesson, Meter, Task
from sgfx.training.teacher import Teacher

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassStatScores

Loss = Callable[[Tensor, Tensor], Tensor]
TOP = (1, 5)
EPSILON = 1e-2  # soft labels in half precision need not sum to 1 exactly


class Classification(Task):
    """Batches are ``(inputs, targets)``: class indices ``[N]``, int64, or probabilities ``[N, classes]``.

    Args:
        loss: of logits ``[N, classes]`` (float32 at least) and targets, a scalar; None: cross-entropy.
        label_smoothing: of cross-entropy.
        teacher: teaches in place of the labels, which are then only counted against.
    """

    best = "top1"

    def __init__(self, loss: Loss | None = None, label_smoothing: float = 0.0, teacher: Teacher | None = None) -> None:
        """Take the options as they are."""
        self._loss, self._label_smoothing, self._teacher = loss, label_smoothing, teacher

    def read(self, batch: Any, name: str, place: str) -> tuple[Any, Tensor | None]:
        """See `Task`; with a teacher, training batches may be inputs alone."""
        if self._teacher is not None and name == "train_data" and _is_unlabelled(batch):
            return (batch if isinstance(batch, Tensor) else batch[0]), None
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            kind = type(batch).__name__
            given = f"{kind} of {len(batch)}" if isinstance(batch, tuple | list) else kind
            raise InputError(
                f"{name} must give batches (inputs, targets), targets being a tensor of class indices [N] or of "
                f"probabilities [N, classes]; {place} is a {given}: change the dataset or its collate_fn"
            )
        return batch[0], batch[1]

    def lesson(self, model: nn.Module, call: Call, inputs: Any, targets: Tensor | None) -> Lesson:
        """See `Task`."""
        if self._teacher is not None:
            logits, loss = self._teacher.lesson(model, (inputs,), lambda: self.outputs(call, inputs, targets))
        else:
            logits = self.outputs(call, inputs, targets)
            loss = self._distance(logits, cast(Tensor, targets))
        return Lesson(logits, {"loss": loss}, len(logits))

    def outputs(self, call: Call, inputs: Any, targets: Tensor | None) -> Tensor:
        """Logits ``[N, classes]``, in single precision at least: half is too coarse for a loss."""
        logits = call(inputs)
        fits = isinstance(logits, Tensor) and logits.dim() == 2
        if not fits or (targets is not None and targets.shape not in (logits.shape[:1], logits.shape)):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            labels = "inputs alone" if targets is None else list(targets.shape)
            raise InputError(
                f"the model must give logits [N, classes] for targets [N] or [N, classes], but gave {given} for "
                f"{labels}; targets are class indices or probabilities, and a model with several outputs needs a "
                "wrapper that returns one"
            )
        if targets is not None:
            _check_targets(targets, logits.shape[1])
        return cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def meter(self) -> Meter:
        """Top-1, and top-5 where there are more than five classes."""
        return TopMeter()

    def rehearse(self, model: nn.Module, call: Call, inputs: Any) -> None:
        """Refuse a teacher with other outputs before statistics of norms have moved."""
        if self._teacher is not None:
            self.lesson(model, call, inputs, None)

    def _distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() == 2:
            targets = targets.to(logits.dtype)
        if self._loss is None:
            return F.cross_entropy(logits, targets, label_smoothing=self._label_smoothing)
        loss = self._loss(logits, targets)
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad >= torch.is_grad_enabled()):
            given = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"loss must give one number that has a gradient, a mean over the batch, not {given}")
        return loss


class TopMeter(Meter):
    """How many examples have their class among the best one, and the best five; torchmetrics counts."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._metrics: dict[int, MulticlassStatScores] = {}
        self._before: dict[str, int] = {}

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch: logits ``[N, classes]`` and class indices ``[N]`` or probabilities ``[N, classes]``."""
        if not self._metrics:
            from torchmetrics.classification import MulticlassStatScores

            classes = outputs.shape[1]
            for k in TOP:
                if k == 1 or k < classes:
                    self._metrics[k] = MulticlassStatScores(
                        classes, top_k=k, average="micro", validate_args=False, sync_on_compute=False
                    ).to(outputs.device)
        labels = targets.argmax(1) if targets.dim() == 2 else targets
        for metric in self._metrics.values():
            metric.update(outputs.detach(), labels)

    def state(self) -> dict[str, int]:
        """``{"top1": hits, …, "examples": n}``."""
        counted = dict(self._before)
        for k, metric in self._metrics.items():
            hits, *_, examples = metric.compute().tolist()
            counted[f"top{k}"] = counted.get(f"top{k}", 0) + int(hits)
            if k == 1:
                counted["examples"] = counted.get("examples", 0) + int(examples)
        return counted

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Meter`."""
        self._before = dict(state)

    @staticmethod
    def results(states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Shares in [0, 1]."""
        names = dict.fromkeys(name for state in states for name in state)
        total = {name: sum(state.get(name, 0) for state in states) for name in names}
        examples = total.pop("examples", 0)
        return {name: hits / examples for name, hits in total.items()}


def _is_unlabelled(batch: Any) -> bool:
    """Whether a batch is inputs alone: a tensor, or a tuple or list of one."""
    return isinstance(batch, Tensor) or (isinstance(batch, tuple | list) and len(batch) == 1)


def _check_targets(targets: Tensor, classes: int) -> None:
    if targets.dim() == 2:
        if not targets.is_floating_point() or not _are_probabilities(targets):
            raise InputError(
                "targets [N, classes] must be probabilities: numbers of floating point in [0, 1] that sum to 1 in each "
                f"row; those of {targets.dtype} given are not"
            )
    elif targets.is_floating_point() or targets.dtype == torch.bool:
        raise InputError(f"targets [N] must be class indices, int64, not {targets.dtype}")
    elif len(targets) and not ((targets >= 0) & (targets < classes)).all():
        raise InputError(
            f"targets go from {int(targets.min())} to {int(targets.max())}, but the model gives logits of {classes} "
            f"classes (0 to {classes - 1}): give it a head for as many classes as the data have"
        )


def _are_probabilities(targets: Tensor) -> bool:
    return bool((targets >= 0).all() and ((targets.float().sum(1) - 1).abs() < EPSILON).all())
