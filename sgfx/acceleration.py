"""An accelerator of one's own: accelerate keeps its settings in process-wide state, which is put aside here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

from passes.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision: TypeAlias = Literal["bf16", "fp16"]


@contextmanager
def own_accelerator(precision: Precision | None) -> Iterator[Accelerator]:
    """An accelerator with a precision of its own, whatever others there are in the process.

    accelerate keeps the precision, the accumulation of gradients and the device in process-wide singletons; the first
    `Accelerator` sets them, and a second one with another precision is an error. It has no public way to let go of
    them, so they are set aside here, and put back for an accelerator that the caller may have. Only the device is
    taken over from it: who asked for the CPU stays there.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    shared = [singleton._shared_state for singleton in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        # Both arguments are given in full: else variables that `accelerate launch` sets would decide.
        accelerator = Accelerator(
            mixed_precision=precision or "no", gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
        )
        if accelerator.num_processes > 1:
            raise InputError(
                f"Trainer runs in one process, not {accelerator.num_processes}: start it without a launcher"
            )
        if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 and say nothing
            raise InputError(
                "mixed_precision='fp16' needs a GPU, and training runs on the CPU here; use 'bf16' or None"
            )
        yield accelerator
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)
