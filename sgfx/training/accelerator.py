"""An accelerator of one's own: accelerate keeps its settings in process-wide state, which is put aside here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
def own_accelerator(
    precision: Precision | None = None, *, accumulate: int = 1, **options: Any
) -> Iterator[Accelerator]:
    """An accelerator with settings of its own, whatever others there are in the process.

    accelerate keeps the precision, the accumulation of gradients and the device in process-wide singletons; the first
    `Accelerator` sets them, and a second one with another precision is an error. It has no public way to let go of
    them, so they are set aside here, and put back for an accelerator that the caller may have. Only the device is
    taken over from it: who asked for the CPU stays there.

    In one process, variables of a launcher have no say. In one of several they decide what the arguments leave open.

    Raises:
        InputError: the processes can't be joined, or not in a way in which each holds the whole model; or the
            precision needs a GPU and there is none.
    """
    processes, source = _launched()  # before accelerate looks: without GPUs it would say one
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [singleton._shared_state for singleton in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        if processes == 1:
            accelerator = _alone(precision, accumulate, options)
        else:
            accelerator = _one_of_several(processes, source, precision, accumulate, options)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # it would be fp32, unsaid
            raise InputError(
                "mixed_precision='fp16' needs a GPU, and training runs on the CPU here; use 'bf16' or None"
            )
        yield accelerator
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


def _alone(precision: Precision | None, accumulate: int, options: dict[str, Any]) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    # All is given in full: else variables that `accelerate launch` sets would decide.
    plugin = GradientAccumulationPlugin(num_steps=accumulate)
    accelerator = Accelerator(mixed_precision=precision or "no", gradient_accumulation_plugin=plugin, **options)
    _check_number(accelerator, 1, "this process")
    return accelerator


def _one_of_several(
    processes: int, source: str, precision: Precision | None, accumulate: int, options: dict[str, Any]
) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
            cpu=not torch.accelerator.is_available(),  # accelerate joins processes on CPUs only where it is told to
            **options,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"this is one of {processes} processes (says {source}), and accelerate can't join them: {error}. Start "
            "them with accelerate launch or torchrun"
        ) from error
    _check_number(accelerator, processes, source)
    others = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    if accelerator.distributed_type in others:
        raise InputError(
            f"every process must hold the whole model, and {accelerator.distributed_type.value} divides it: choose "
            "plain distributed data parallel in accelerate config"
        )
    return accelerator


def _launched() -> tuple[int, str]:
    """How many processes this one was started with, and what says so."""
    said = [(int(value), name) for name in PROCESSES if (value := os.environ.get(name, "")).isdecimal()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said.append((torch.distributed.get_world_size(), "torch.distributed"))
    return max(said, default=(1, ""))


def _check_number(accelerator: Accelerator, processes: int, source: str) -> None:
    if accelerator.num_processes != processes:
        raise InputError(
            f"this is one of {processes} processes (says {source}), and accelerate sees {accelerator.num_processes}: "
            "each would train a model of its own. Start them with accelerate launch or torchrun, or train in one "
            "process without that setting"
        )
