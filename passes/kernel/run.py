"""One call of a packed layer: allocate, fill in the addresses, copy the planes if needed, multiply."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from passes.errors import InputError
from passes.kernel import threads
from passes.kernel.activations import activation
from passes.kernel.call import Call
from passes.kernel.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.library import Library, library
from passes.kernel.memory import empty
from passes.kernel.packing import Tables
from passes.kernel.schedule import DEFAULT_TILING, Job, Schedule, Tiling, schedule
from passes.kernel.target import MOST_FILTERS, Target, host

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
    """A form for inputs of one shape: all that a call needs besides its tensors."""

    schedule: Schedule
    template: Call
    out_shape: tuple[int, ...]
    residual_shape: tuple[int, ...] | None
    reads_from: int  # numbers between the start of the input and the first pixel of its picture
    adds_from: int
    library: Library  # keeps the code alive


@cache
def _compiled() -> tuple[Any, int, Any, int]:
    """The driver's two functions, callable and as addresses."""
    from passes.kernel.driver import multiply
    from passes.kernel.planes import copy_planes as copy

    return copy.ctypes, copy.address, multiply.ctypes, multiply.address


def prepare(target: Target | None = None) -> Target:
    """Compile the kernel for this machine, or load it from the cache, so that no later call has to.

    Returns the target. Where the kernel can't run, raises `InputError` with the reason.
    """
    found = host() if target is None else target
    if isinstance(found, str):
        raise InputError(found)
    _compiled()
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
        raise InputError(f"the layer reads [N, {geometry.in_channels}, H, W], not {list(shape)}")
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


def execute(plan: Plan, x: Tensor, residual: Tensor | None, tables: Tables, out: Tensor | None = None) -> Tensor:
    """Compute ``activation(layer(x) + residual)``.

    Args:
        plan: for an input of this shape.
        x: fp32 ``[N, C_in, H, W]`` on the CPU, margins included; copied unless each image is contiguous.
        residual: what to add, margins included, or None; likewise.
        tables: the packed layer.
        out: where to write, or None for a new tensor. Each image must be contiguous, so a range of the channels of a
            wider tensor will do.

    Returns:
        fp32 ``[N, C_out, H', W']``, margins included: `out` if that was given.
    """
    _check(plan, x, residual, tables, out)
    out, found = empty(plan.out_shape) if out is None else out, plan.schedule
    if out.numel() == 0:
        return out
    x = _by_image(x)
    call = Call.from_buffer_copy(plan.template)
    call.address = address = ctypes.addressof(call)
    call.weight, call.bias = tables.weight.data_ptr(), tables.bias.data_ptr()
    call.inputs, call.filters, call.blocks = (
        tables.inputs.data_ptr(),
        tables.filters.data_ptr(),
        tables.blocks.data_ptr(),
    )
    call.out = out.data_ptr() + 4 * call.out_top * call.out_row
    call.out_image, call.x, call.picture_image = out.stride(0), x.data_ptr(), x.stride(0)
    if residual is not None:
        residual = _by_image(residual)
        call.residual_image = residual.stride(0)
        call.residual = residual.data_ptr() + 4 * plan.adds_from
    if found.tiles:
        tiles = empty((found.tiles,))
        call.tiles = tiles.data_ptr()
    copy, copy_address, multiply, multiply_address = _compiled()
    if found.copied:
        planes = empty((found.copied,))
        call.picture, call.planes, call.x = call.x + 4 * plan.reads_from, planes.data_ptr(), planes.data_ptr()
        threads.run(copy, copy_address, address, found.threads)
        call.next_task = call.next_slot = 0
    else:
        call.x_image = x.stride(0)
    threads.run(multiply, multiply_address, address, found.threads)
    return out


def _by_image(tensor: Tensor) -> Tensor:
    """The tensor itself if each of its images is contiguous, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or tensor[0].is_contiguous() else tensor.contiguous()


def _check(plan: Plan, x: Tensor, residual: Tensor | None, tables: Tables, out: Tensor | None) -> None:
    for name, tensor in (("input", x), ("residual", residual), ("weight", tables.weight), ("out", out)):
        if tensor is not None and (tensor.dtype is not torch.float32 or not tensor.is_cpu):
            raise InputError(f"the kernel computes fp32 on the CPU; the {name} is {tensor.dtype} on {tensor.device}")
    if residual is not None and residual.shape != plan.residual_shape:
        raise InputError(f"the residual must be {list(plan.residual_shape or ())}, not {list(residual.shape)}")
    if out is None:
        return
    if out.shape != plan.out_shape or (out.numel() and not out[0].is_contiguous()):
        found = f"{list(out.shape)} with strides {out.stride()}"
        raise InputError(f"out must be {list(plan.out_shape)} with contiguous images, not {found}")
