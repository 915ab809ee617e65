"""Gradient descent towards a teacher, at a rate that is decided by what it does.

1. Adam; the rate warms up over a tenth of the steps and falls to 0 along a cosine.
2. After each tenth the distance on the examples that are held out is looked at. The nearest look is kept.
3. Where the distance is more than a tenth above that, has not been below it for three looks, or a loss is not finite,
   the weights go back to the nearest look, Adam begins anew, and the rate is half of what it was from there on. (A rate
   that is right may lose a little at first.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes.calibration import Arguments, single_image
from passes.errors import InputError, let_memory_errors_pass
from passes.models import shapes_of
from passes.options import call_model
from sgfx.training.drawing import Examples
from sgfx.training.teacher import Teacher

LOOKS = 10
GROWN = 1.1
PATIENCE = 3  # looks


class Descent:
    """One descent of a model, whose parameters move.

    Args:
        model: what is trained.
        trained: its parameters that are.
        teacher: what it is brought closer to.
        examples: what it learns from and is judged by.

    Attributes:
        step: how many whole steps there were.
        nearest_step: the step after which the model was nearest to the teacher; 0 if it was nearest at the start.
        halved: how often the rate was halved.
    """

    def __init__(self, model: nn.Module, trained: list[nn.Parameter], teacher: Teacher, examples: Examples) -> None:
        """Look at the model as it is."""
        self._model, self._teacher, self._examples = model, teacher, examples
        self._live: list[Tensor] = list(trained)
        self._kept = [parameter.detach().clone() for parameter in trained]
        self.step, self.nearest_step, self.halved, self._idle = 0, 0, 0, 0
        self._nearest = self._look()

    def run(self, steps: int, lr: float) -> Iterator[None]:
        """Descend step by step; yields after each whole one.

        Raises:
            FloatingPointError: the distance is not finite to begin with, or became so and nothing was gained.
        """
        if not math.isfinite(self._nearest):
            raise FloatingPointError(f"the loss became {self._nearest} before the first step: look for large values")
        optimizer, lost, every = self._optimizer(), "", max(1, steps // LOOKS)
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = lr / 2**self.halved * warmed_cosine(step, steps)
            found = self._train(optimizer)
            self.step = step
            if not math.isfinite(found) or step % every == 0 or step == steps:
                found = self._look() if math.isfinite(found) else found
                if not math.isfinite(found):
                    lost = lost or f"the loss became {found} in step {step}; try an lr below {lr:g}"
                if self._is_astray(found):
                    self.put_back()
                    optimizer = self._optimizer()
                    self.halved += 1
            yield
        self.put_back()
        if lost and not self.nearest_step:
            raise FloatingPointError(lost)

    def put_back(self) -> None:
        """Give the model the weights of the nearest look."""
        with torch.no_grad():
            torch._foreach_copy_(self._live, self._kept)

    def _is_astray(self, distance: float) -> bool:
        """Keep what is nearer than any look before; tell whether to go back from what is not."""
        if distance < self._nearest:
            with torch.no_grad():
                torch._foreach_copy_(self._kept, self._live)  # one call, so all of them or none when Ctrl-C comes
            self._nearest, self.nearest_step, self._idle = distance, self.step, 0
            return False
        self._idle += 1
        astray = self._idle == PATIENCE or not distance <= GROWN * self._nearest  # NaN too
        self._idle = 0 if astray else self._idle
        return astray

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._live)

    def _train(self, optimizer: torch.optim.Adam) -> float:
        """Take one step; returns its loss."""
        loss = self._loss(self._examples.draw())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def _loss(self, inputs: Arguments) -> Tensor:
        return self._teacher.lesson(self._model, inputs, partial(_run, self._model, inputs))[1]

    def _look(self) -> float:
        """The distance on what is held out."""
        with torch.no_grad():
            found = [self._loss(inputs).item() for inputs in self._examples.held_out()]
        return sum(found) / len(found)


def warmed_cosine(step: int, steps: int) -> float:
    """The share of the rate in `step` (from 1) of `steps`: up over the first tenth, and down along a cosine."""
    return min(1.0, step / max(1, steps // LOOKS)) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def _run(model: nn.Module, inputs: Arguments) -> Any:
    try:
        return call_model(model, inputs)
    except Exception as error:
        let_memory_errors_pass(error)
        hint = single_image(inputs)
        raise InputError(f"data of shape {shapes_of(inputs)} do not fit the model: {error}{hint}") from error
