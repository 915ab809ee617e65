"""What a task is to the trainer: what a batch holds, what is to be minimised, what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

from torch import Tensor, nn

Call: TypeAlias = Callable[..., Any]  # the model, on its device and in the precision of training


class Lesson(NamedTuple):
    """What one batch gives.

    Attributes:
        outputs: the model's, to be measured, or None.
        losses: scalars by name, each a mean over the batch's examples; their sum is minimised.
        examples: how many there are in the batch.
    """

    outputs: Any
    losses: dict[str, Tensor]
    examples: int


class Meter(ABC):
    """Counts what a task measures over the batches of one epoch."""

    @abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:
        """Count a batch."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was counted so far, as plain data."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what was counted before."""

    @staticmethod
    @abstractmethod
    def results(states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What is measured, by name, from what the processes counted; empty where nothing was."""


class Task(ABC):
    """What the trainer asks of a task.

    Attributes:
        best: which result on the validation data says that an epoch is the best; higher is better.
        gathers_objects: whether outputs and targets of several processes are gathered as objects, not as tensors of
            one shape.
    """

    best: ClassVar[str]
    gathers_objects: ClassVar[bool] = False

    @abstractmethod
    def read(self, batch: Any, name: str, place: str) -> tuple[Any, Any]:
        """Take a batch apart into inputs and targets, which are None where there are no labels.

        Raises:
            InputError: it has another form; says in which data and where.
        """

    @abstractmethod
    def lesson(self, model: nn.Module, call: Call, inputs: Any, targets: Any) -> Lesson:
        """Run the model, in train mode, through `call`, and say what is to be minimised; differentiable."""

    @abstractmethod
    def outputs(self, call: Call, inputs: Any, targets: Any) -> Any:
        """Run the model, in eval mode; gives what the meter takes."""

    @abstractmethod
    def meter(self) -> Meter:
        """A new meter."""

    @abstractmethod
    def rehearse(self, model: nn.Module, call: Call, inputs: Any) -> None:
        """Before training moves anything, without gradients, in eval mode: refuse what can't be trained."""
