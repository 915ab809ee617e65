"""What is known of a layer's calls before there are tensors: its form, and the plan for inputs of one shape."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from passes.errors import InputError
from passes.kernel.codegen.activations import activation
from passes.kernel.codegen.object_code import Library, library
from passes.kernel.codegen.target import MOST_FILTERS, Target, host
from passes.kernel.layout.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.layout.schedule import DEFAULT_TILING, Job, Schedule, Tiling, schedule
from passes.kernel.runtime.call_record import Call

_IOTA = (ctypes.c_int64 * MOST_FILTERS)(*range(MOST_FILTERS))


@dataclass(frozen=True)
class Placement:
    """Margins of what a layer reads, of what it adds, and of what it writes; the default is none."""

    reads: Margins = NO_MARGINS
    adds: Margins = NO_MARGINS
    writes: Margins = NO_MARGINS


NO_PLACEMENT = Placement()


@dataclass(frozen=True)
class Form:
    """How a layer is computed, apart from its weights.

    Attributes:
        geometry: kernel, stride, padding, dilation, channels.
        activation: name of the activation, or None.
        placement: the margins of input, residual and result.
        tiling: how the work is cut.
        target: micro-kernels to use instead of the machine's own, or None (for tests).
    """

    geometry: Geometry
    activation: str | None = None
    placement: Placement = NO_PLACEMENT
    tiling: Tiling = DEFAULT_TILING
    target: Target | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A form for inputs of one shape: all that a call needs besides its tensors.

    Attributes:
        schedule: how the work is divided.
        template: the call, without the addresses of tensors.
        out_shape: shape of the result, margins included.
        residual_shape: shape of what is added, margins included, or None.
        reads_from: numbers between the start of the input and the first pixel of its picture.
        adds_from: the same for the residual.
        library: keeps the code alive.
    """

    schedule: Schedule
    template: Call
    out_shape: tuple[int, ...]
    residual_shape: tuple[int, ...] | None
    reads_from: int
    adds_from: int
    library: Library


@cache
def compiled() -> tuple[Any, int]:
    """The driver's function, callable and as an address."""
    from passes.kernel.runtime.driver import run_steps

    return run_steps.ctypes, run_steps.address


def prepare(target: Target | None = None) -> Target:
    """Compile the kernel for this machine, or load it from the cache, so that no later call has to.

    Returns the target. Where the kernel can't run, raises `InputError` with the reason.
    """
    found = host() if target is None else target
    if isinstance(found, str):
        raise InputError(found)
    compiled()
    library(found)
    return found


def output_shape(shape: Any, form: Form, margins: Margins) -> tuple[Any, Any, Any, Any]:
    """Shape of a result in `margins` for an input of `shape`, ``[N, C, H, W]`` with the margins that the form reads."""
    rows, columns = form.geometry.output_size(*form.placement.reads.picture_size(shape))
    return shape[0], form.geometry.out_channels, margins.top + rows + margins.bottom, columns + margins.right


@lru_cache(maxsize=4096)
def plan(form: Form, shape: tuple[int, ...], has_residual: bool, pieces: int, team: int) -> Plan:
    """Plan the calls of a form for inputs of `shape`, with `pieces` pieces of blocks, on `team` threads."""
    geometry, placement = form.geometry, form.placement
    if len(shape) != 4 or shape[1] != geometry.in_channels:
        raise InputError(f"the layer reads [N, {geometry.in_channels}, H, W], not [N, {str(list(shape[1:]))[1:]}")
    target = prepare(form.target)
    height, width = placement.reads.picture_size(shape)
    adds = placement.adds if has_residual else None
    found = schedule(
        Job(geometry, form.tiling, shape[0], height, width, placement.reads, adds, placement.writes,
            pieces, target.lanes, team)
    )  # fmt: skip
    kernels, call = library(target), Call.from_buffer_copy(found.template)
    call.kernels, call.iota, call.block_count = ctypes.addressof(kernels.addresses), ctypes.addressof(_IOTA), pieces
    does = activation(form.activation)
    call.code, call.low, call.high = does.code, does.low, does.high
    return Plan(
        schedule=found,
        template=call,
        out_shape=output_shape(shape, form, placement.writes),
        residual_shape=output_shape(shape, form, placement.adds) if has_residual else None,
        reads_from=placement.reads.top * call.picture_row,
        adds_from=placement.adds.top * call.residual_row,
        library=kernels,
    )
