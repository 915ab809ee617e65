"""The time by which a model was made: what was asked for, predicted and measured; it stays with the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from passes.freezing.choosing.decisions import attach_decisions, decisions_of
from passes.layers.attached import Attached


@dataclass(frozen=True)
class Timing:
    """How a budget of milliseconds was met.

    Attributes:
        asked: milliseconds of the frozen model, as the budget says.
        predicted: what it should take by the times of its layers.
        measured: what it took.
        machine: that it was measured on.
        noisy: whether that was busy, so that the times are not to be relied on.
    """

    asked: float
    predicted: float
    measured: float
    machine: str
    noisy: bool = False

    def __str__(self) -> str:
        """In a line."""
        busy = "; it was busy, so that this is not to be relied on" if self.noisy else ""
        times = f"{self.asked:.2f} ms asked, {self.predicted:.2f} predicted, {self.measured:.2f} measured"
        return f"frozen: {times}, on {self.machine}{busy}"


_TIMING = Attached("timing", Timing)


def attach_timing(model: nn.Module, timing: Timing) -> None:
    """Keep with a model how it met its budget."""
    _TIMING.put(model, timing)


def timing_of(model: nn.Module) -> Timing | None:
    """How a model met its budget of milliseconds, or None."""
    return _TIMING.of(model)


def hand_on_times(measured: nn.Module | None, model: nn.Module) -> None:
    """Keep with `model` the timing and the decisions of `measured`, which is run like it, and no timing of before."""
    _TIMING.take_off(model)
    if measured is not None and (timing := timing_of(measured)) is not None:
        attach_timing(model, timing)
        attach_decisions(model, decisions_of(measured))
