"""How a step runs that needs no rows of pixels put together: it reads the picture as it is, channel by channel.

Nothing is copied, staged or folded. The work is cut into images × chunks: of channels, or, of a layer on pictures of
one pixel, of its pieces.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from passes.errors import InputError
from passes.kernel.layout.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.layout.schedule import Schedule
from passes.kernel.runtime.call_record import Call

_TASKS = 4  # per thread
_SMALL = 4096  # multiplications or numbers that are not worth a task


def pointwise_schedule(
    shape: Sequence[int], reads: Margins, adds: Margins | None, writes: Margins, is_gate: bool, threads: int
) -> Schedule:
    """A result of the size of the input, for an input of `shape`, margins included."""
    call = _reading(shape, reads)
    height, width = reads.picture_size(shape)
    _writing(call, (height, width), writes)
    if adds is not None:
        rows, columns = (1, 1) if is_gate else (height, width)
        call.residual_row = columns + adds.right
        call.residual_channel = (adds.top + rows + adds.bottom) * call.residual_row
    return _divided(call, shape[1], shape[1] * height * width, threads)


def mean_schedule(shape: Sequence[int], reads: Margins, writes: Margins, threads: int) -> Schedule:
    """One number of each channel."""
    call = _reading(shape, reads)
    _writing(call, (1, 1), writes)
    return _divided(call, shape[1], shape[1] * call.height * call.width, threads)


def window_schedule(
    geometry: Geometry, shape: Sequence[int], reads: Margins, writes: Margins, threads: int, *, tables: bool
) -> Schedule:
    """Windows over each channel; `tables` asks for tables of the channels, which a layer has."""
    call = _reading(shape, reads)
    size = geometry.output_size(call.height, call.width)
    if min(size) < 1:
        raise InputError(f"a picture of {call.height} × {call.width} pixels is smaller than the window: {geometry}")
    _writing(call, size, writes)
    call.kernel_height, call.kernel_width = geometry.kernel_size
    call.tap_count = call.kernel_height * call.kernel_width
    call.stride_height, call.stride_width = geometry.stride
    call.dilation_height, call.dilation_width = geometry.dilation
    call.shift_top, _, call.shift_left, _ = geometry.padding
    kept = (ctypes.c_int64 * shape[1])(*range(shape[1])) if tables else None
    if kept is not None:
        call.inputs = call.filters = ctypes.addressof(kept)
    return _divided(call, shape[1], shape[1] * size[0] * size[1] * call.tap_count, threads, (kept,))


def pixel_schedule(
    geometry: Geometry, shape: Sequence[int], reads: Margins, adds: Margins | None, writes: Margins, pieces: int,
    threads: int,
) -> Schedule:  # fmt: skip
    """A layer of one tap on pictures of one pixel."""
    call = _reading(shape, reads)
    _writing(call, (1, 1), writes)
    if adds is not None:
        call.residual_row = 1 + adds.right
        call.residual_channel = (adds.top + 1 + adds.bottom) * call.residual_row
    return _divided(call, pieces, geometry.in_channels * geometry.out_channels, threads)


def _reading(shape: Sequence[int], reads: Margins) -> Call:
    """A call that reads a picture inside its margins."""
    height, width = reads.picture_size(shape)
    call = Call(images=shape[0], channels=shape[1], height=height, width=width)
    call.picture_row, call.picture_channel = shape[3], shape[2] * shape[3]
    return call


def _writing(call: Call, size: tuple[int, int], writes: Margins = NO_MARGINS) -> None:
    call.rows, call.columns = size
    call.out_row, call.out_top, call.out_bottom = size[1] + writes.right, writes.top, writes.bottom
    call.out_channel = (writes.top + size[0] + writes.bottom) * call.out_row


def _divided(call: Call, most: int, work: int, threads: int, kept: tuple[object, ...] = ()) -> Schedule:
    wanted = _TASKS * threads if threads > 1 else 1
    call.chunks = max(1, min(wanted, most, work // _SMALL))
    call.tasks = call.images * call.chunks
    tasks: int = call.tasks
    return Schedule(0, 0, max(1, min(threads, tasks)), False, call, kept)
