"""One call of a packed layer: allocate, fill in the addresses, copy the planes if needed, multiply."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from passes.errors import InputError
from passes.kernel import threads
from passes.kernel.activations import activation
from passes.kernel.call import Call
from passes.kernel.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.library import library
from passes.kernel.packing import Tables
from passes.kernel.schedule import Job, Schedule, Tiling, schedule
from passes.kernel.target import MOST_FILTERS, Target, host

_IOTA = (ctypes.c_int64 * MOST_FILTERS)(*range(MOST_FILTERS))


@dataclass(frozen=True)
class Placement:
    """Margins of what a layer reads, of what it adds, and of what it writes; the default is none."""

    reads: Margins = NO_MARGINS
    adds: Margins = NO_MARGINS
    writes: Margins = NO_MARGINS


@cache
def _compiled() -> tuple[Any, int, Any, int]:
    """The driver's two functions, callable and as addresses."""
    from passes.kernel import driver

    copy, multiply = driver.copy_planes, driver.multiply
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


def output_shape(x: Tensor, geometry: Geometry, placement: Placement) -> tuple[Any, Any, Any, Any]:
    """Shape of the result for an input ``[N, C, H, W]``, margins included."""
    reads, writes = placement.reads, placement.writes
    height, width = reads.picture_size(x.shape)
    rows, columns = geometry.output_size(height, width)
    return x.shape[0], geometry.out_channels, writes.top + rows + writes.bottom, columns + writes.right


def convolve(
    x: Tensor,
    residual: Tensor | None,
    tables: Tables,
    geometry: Geometry,
    *,
    function: str | None = None,
    placement: Placement = Placement(),  # noqa: B008  (frozen)
    tiling: Tiling = Tiling(),  # noqa: B008  (frozen)
    target: Target | None = None,
) -> Tensor:
    """Compute ``function(layer(x) + residual)``.

    Args:
        x: fp32 ``[N, C_in, H, W]`` on the CPU, in its margins; copied if it is not contiguous.
        residual: what to add, of the result's size in its own margins, or None.
        tables: the packed layer.
        geometry: its geometry.
        function: name of the activation, or None.
        placement: the margins of input, residual and result.
        tiling: how to cut the work.
        target: micro-kernels to use instead of the machine's own (for tests).

    Returns:
        fp32 ``[N, C_out, H', W']`` in its margins, which are zero.
    """
    _check(x, residual, geometry, placement)
    used = prepare(target)
    shape = output_shape(x, geometry, placement)
    height, width = placement.reads.picture_size(x.shape)
    adds = None if residual is None else placement.adds
    plan = schedule(
        Job(geometry, tiling, shape[0], height, width, placement.reads, adds, placement.writes,
            len(tables.blocks) - 1, used.lanes, threads.available())
    )  # fmt: skip
    out = torch.empty(shape)
    if out.numel() == 0:
        return out
    _execute(plan, x.contiguous(), None if residual is None else residual.contiguous(), tables, out, used, function, placement)
    return out


def _execute(
    plan: Schedule,
    x: Tensor,
    residual: Tensor | None,
    tables: Tables,
    out: Tensor,
    target: Target,
    function: str | None,
    placement: Placement,
) -> None:
    copy, copy_address, multiply, multiply_address = _compiled()
    call = Call.from_buffer_copy(plan.template)
    call.address = address = ctypes.addressof(call)
    call.kernels, call.iota = ctypes.addressof(library(target).addresses), ctypes.addressof(_IOTA)
    call.weight, call.bias, call.block_count = tables.weight.data_ptr(), tables.bias.data_ptr(), len(tables.blocks) - 1
    call.inputs, call.filters, call.blocks = (t.data_ptr() for t in (tables.inputs, tables.filters, tables.blocks))
    does = activation(function)
    call.code, call.low, call.high = does.code, does.low, does.high
    call.out_image = out.stride(0)
    call.out = out.data_ptr() + 4 * call.out_top * call.out_row
    if residual is not None:
        call.residual_image = residual.stride(0)
        call.residual = residual.data_ptr() + 4 * placement.adds.top * call.residual_row
    tiles = torch.empty(plan.tiles)
    call.tiles, call.x = tiles.data_ptr(), x.data_ptr()
    if plan.copied:
        planes = torch.empty(plan.copied)
        call.picture, call.picture_image = x.data_ptr() + 4 * placement.reads.top * call.picture_row, x.stride(0)
        call.planes = call.x = planes.data_ptr()
        threads.run(copy, copy_address, address, min(plan.threads, call.images * call.channels))
        call.next_task = call.next_slot = 0
    threads.run(multiply, multiply_address, address, plan.threads)


def _check(x: Tensor, residual: Tensor | None, geometry: Geometry, placement: Placement) -> None:
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise InputError(f"the layer reads [N, {geometry.in_channels}, H, W], not {list(x.shape)}")
    for name, tensor in (("input", x), ("residual", residual)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise InputError(f"the kernel computes fp32 on the CPU; the {name} is {tensor.dtype} on {tensor.device}")
    if residual is None:
        return
    expected = output_shape(x, geometry, Placement(placement.reads, writes=placement.adds))
    if residual.shape != expected:
        raise InputError(f"the residual must be {list(expected)}, not {list(residual.shape)}")
