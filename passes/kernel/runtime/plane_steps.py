"""The compiled loops of steps that read pictures as they are: pointwise, means, windows, layers on one pixel."""

from __future__ import annotations

from typing import Any

from passes.kernel.codegen.object_code import PLANE_KERNELS
from passes.kernel.codegen.plane_kernels import COMBINE
from passes.kernel.codegen.window_kernel import AT_ONCE
from passes.kernel.layout.packing import BLOCK_FIELDS
from passes.kernel.runtime.intrinsics import call_kernel, clear, integers, jit

_POINTWISE, _MEAN, _PIXEL = map(PLANE_KERNELS.index, ("sgfx_pointwise", "sgfx_mean", "sgfx_pixel"))
_GATE = COMBINE.index("gate")
_FILTERS, _INPUTS, _FIRST_INPUT, _FIRST_FILTER, _FIRST_WEIGHT, _ = range(BLOCK_FIELDS)


@jit
def _clear_around(call: Any, out: int) -> None:
    """Clear the margins of a plane whose first pixel is at `out`."""
    row = 4 * call.out_row
    clear(out - call.out_top * row, call.out_top * call.out_row)
    if call.out_row > call.columns:
        for line in range(call.rows):
            clear(out + line * row + 4 * call.columns, call.out_row - call.columns)
    clear(out + call.rows * row, call.out_bottom * call.out_row)


@jit
def pointwise_task(call: Any, task: int) -> None:
    """Some channels of an image, each combined with a plane, or a number, of the second input."""
    image, chunk = task // call.chunks, task % call.chunks
    rows, columns = call.rows, call.columns
    whole = call.picture_row == columns and call.out_row == columns
    if whole and (call.combine == 0 or call.combine == _GATE or call.residual_row == columns):
        rows, columns = 1, rows * columns  # rows that follow each other without a gap are one
    for channel in range(chunk * call.channels // call.chunks, (chunk + 1) * call.channels // call.chunks):
        x = call.picture + 4 * (image * call.picture_image + channel * call.picture_channel)
        y = call.residual + 4 * (image * call.residual_image + channel * call.residual_channel)
        out = call.out + 4 * (image * call.out_image + channel * call.out_channel)
        arguments = (
            x, y, out, rows, columns, call.picture_row, call.residual_row, call.out_row, call.combine,
            call.code, call.low, call.high,
        )  # fmt: skip
        call_kernel(integers(call.kernels)[_POINTWISE], arguments)
        _clear_around(call, out)


@jit
def mean_task(call: Any, task: int) -> None:
    """The means of some channels of an image."""
    image, chunk = task // call.chunks, task % call.chunks
    rows, columns = call.height, call.width
    if call.picture_row == columns:
        rows, columns = 1, rows * columns
    for channel in range(chunk * call.channels // call.chunks, (chunk + 1) * call.channels // call.chunks):
        x = call.picture + 4 * (image * call.picture_image + channel * call.picture_channel)
        out = call.out + 4 * (image * call.out_image + channel * call.out_channel)
        call_kernel(integers(call.kernels)[_MEAN], (x, rows, columns, call.picture_row, out))
        _clear_around(call, out)


@jit
def window_task(call: Any, task: int) -> None:
    """Some channels of an image, four at a time."""
    image, chunk = task // call.chunks, task % call.chunks
    x, out = call.picture + 4 * image * call.picture_image, call.out + 4 * image * call.out_image
    channel, end = chunk * call.channels // call.chunks, (chunk + 1) * call.channels // call.chunks
    while channel < end:
        count = AT_ONCE if channel + AT_ONCE <= end else 1
        inputs, filters = call.inputs + 8 * channel, call.filters + 8 * channel
        weight, bias = call.weight + 4 * channel * call.tap_count, call.bias + 4 * channel
        kernel = call.window_kernel if count == AT_ONCE else call.window_kernel_of_one
        call_kernel(kernel, (call.address, x, inputs, out, filters, weight, bias))
        for index in range(count):
            _clear_around(call, out + 4 * integers(filters)[index] * call.out_channel)
        channel += count


@jit
def pixel_task(call: Any, image: int, first: int, end: int) -> None:
    """The pieces ``first … end`` of a layer on an image of one pixel."""
    x, out = call.picture + 4 * image * call.picture_image, call.out + 4 * image * call.out_image
    residual = call.residual + 4 * image * call.residual_image if call.residual != 0 else 0
    for block in range(first, end):
        fields = integers(call.blocks + 8 * BLOCK_FIELDS * block)
        filters, first_filter = fields[_FILTERS], fields[_FIRST_FILTER]
        rows = call.filters + 8 * first_filter
        arguments = (
            x, call.inputs + 8 * fields[_FIRST_INPUT], fields[_INPUTS], call.picture_channel,
            call.weight + 4 * fields[_FIRST_WEIGHT], call.bias + 4 * first_filter, filters, rows,
            out, call.out_channel, residual, call.residual_channel, call.code, call.low, call.high,
        )  # fmt: skip
        call_kernel(integers(call.kernels)[_PIXEL], arguments)
        for m in range(filters):
            _clear_around(call, out + 4 * integers(rows)[m] * call.out_channel)
