"""An accelerator of one's own: accelerate keeps its settings in process-wide state, which is put aside here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from passes.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision: TypeAlias = Literal["bf16", "fp16"]
# How launchers say how many processes they started: torchrun and accelerate's own, several MPIs, srun.
PROCESSES = (
    "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


@contextmanager
def own_accelerator(precision: Precision | None) -> Iterator[Accelerator]:
    """An accelerator with a precision of its own, whatever others there are in the process.

    accelerate keeps the precision, the accumulation of gradients and the device in process-wide singletons; the first
    `Accelerator` sets them, and a second one with another precision is an error. It has no public way to let go of
    them, so they are set aside here, and put back for an accelerator that the caller may have. Only the device is
    taken over from it: who asked for the CPU stays there.

    Raises:
        InputError: the process is one of several, or the precision needs a GPU and there is none.
    """
    _refuse_several(*_launched())  # before accelerate looks: without GPUs it would say one, or wait for the others
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
        _refuse_several(accelerator.num_processes, "accelerate")
        if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in fp32 and say nothing
            raise InputError(
                "mixed_precision='fp16' needs a GPU, and training runs on the CPU here; use 'bf16' or None"
            )
        yield accelerator
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


def _launched() -> tuple[int, str]:
    """How many processes this one was started with, and what says so."""
    said = [(int(value), name) for name in PROCESSES if (value := os.environ.get(name, "")).isdecimal()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said.append((torch.distributed.get_world_size(), "torch.distributed"))
    return max(said, default=(1, ""))


def _refuse_several(processes: int, source: str) -> None:
    if processes > 1:
        raise InputError(
            f"Trainer runs in one process, not {processes} (says {source}): each would train a model of its own. Start "
            "it without a launcher such as torchrun, or call it in one process alone, without that setting"
        )
