"""The compiled loops around the micro-kernels: strips of pixels × blocks of filters.

Every thread of a call runs the same function on the same array of `Call`, a step each, and takes tasks off a shared
counter until none is left, so a thread that is held up holds up nobody, and one thread alone does all the work. Between
two layers, and between copying planes and computing with them, the threads wait for each other.

Or each thread has an array of its own and takes images, which it computes from the first layer to the last: nobody
waits, and what a layer has written is in the caches of the core that reads it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from passes.kernel.codegen.object_code import TABLE_WIDTH
from passes.kernel.layout.packing import BLOCK_FIELDS
from passes.kernel.runtime.call_record import LAYER, MEAN, PIXEL, POINTWISE
from passes.kernel.runtime.intrinsics import (
    NEXT_IMAGE,
    NEXT_SLOT,
    NEXT_TASK,
    call_function,
    call_kernel,
    clear,
    copy,
    entry,
    floats,
    integers,
    jit,
    prefetch,
    take,
)
from passes.kernel.runtime.plane_steps import mean_task, pixel_task, pointwise_task, window_task
from passes.kernel.runtime.planes import copy_image, copy_planes

_FILTERS, _INPUTS, _FIRST_INPUT, _FIRST_FILTER, _FIRST_WEIGHT, _WORK_BEFORE = range(BLOCK_FIELDS)
_TILE_FILTERS = 8


@jit
def _first_row(call: Any, pixel: int) -> tuple[int, int]:
    """The image and the row in it that contain `pixel`, or in whose margin it lies."""
    image = pixel // call.image_pixels
    return image, min((pixel - image * call.image_pixels) // call.row, call.rows_per_image - 1)


@jit
def _place(call: Any, tile: int, first: int, end: int, out: int) -> None:
    """Copy pixels ``first … end`` of one filter from its tile into the picture, and clear the margins they touch."""
    image, row = _first_row(call, first)
    start = image * call.image_pixels + row * call.row
    while start < end:
        left, right = max(start, first), min(start + call.columns, end)
        line = out + 4 * (image * call.out_image + row * call.out_row)
        if left < right:
            copy(line + 4 * (left - start), tile + 4 * (left - first), right - left)
            if left == start and row == 0:
                clear(line - 4 * call.out_top * call.out_row, call.out_top * call.out_row)
            if right == start + call.columns:
                below = call.out_bottom if row == call.rows_per_image - 1 else 0
                clear(line + 4 * call.columns, call.out_row - call.columns + below * call.out_row)
        row += 1
        start += call.row
        if row == call.rows_per_image:
            image, row, start = image + 1, 0, (image + 1) * call.image_pixels
            if image == call.rows // call.rows_per_image:
                return


@jit
def _fetch(call: Any, tile: int, first: int, end: int, residual: int) -> None:
    """Copy what is to be added to pixels ``first … end`` of one filter into its tile."""
    image, row = _first_row(call, first)
    start = image * call.image_pixels + row * call.row
    while start < end:
        left, right = max(start, first), min(start + call.columns, end)
        line = residual + 4 * (image * call.residual_image + row * call.residual_row)
        if left < right:
            copy(tile + 4 * (left - first), line + 4 * (left - start), right - left)
        row += 1
        start += call.row
        if row == call.rows_per_image:
            image, row, start = image + 1, 0, (image + 1) * call.image_pixels
            if image == call.rows // call.rows_per_image:
                return


@jit
def _clear_margins(call: Any, first: int, end: int, gap: int, out: int) -> None:
    """Clear what lies beside, above and below pixels ``first … end``, which were computed where they belong.

    `gap` is the first pixel of the margin beside the row of pixel `first`.
    """
    whole = call.rows * call.row
    if first == 0:
        clear(out - 4 * call.out_top * call.out_row, call.out_top * call.out_row)
    if end == call.pixels:
        clear(out + 4 * whole, call.out_bottom * call.out_row)
        end = whole
    numbers = floats(out)
    for column in range(call.row - call.columns):  # down each column: a row's margin is too short to loop over
        start = gap + column
        if start < first:
            start += call.row
        for pixel in range(start, end, call.row):
            numbers[pixel] = np.float32(0)


@jit
def _run_block(call: Any, block: int, x: int, image: int, first: int, end: int, tiles: int) -> None:
    """Compute pixels ``first … end`` of the filters of one block: runs of vectors of nearly equal length."""
    fields = integers(call.blocks + 8 * BLOCK_FIELDS * block)
    filters, first_filter = fields[_FILTERS], fields[_FIRST_FILTER]
    rows = call.filters + 8 * first_filter
    out = call.out + 4 * image * call.out_image
    residual = call.residual + 4 * image * call.residual_image if call.residual != 0 else 0
    at_out, at_residual, at_rows = out + 4 * first, residual + 4 * first if residual != 0 else 0, rows
    out_stride, residual_stride = call.out_channel, call.residual_channel
    if call.staged != 0:
        at_out, at_rows, out_stride, residual_stride = tiles, call.iota, call.tile_row, call.tile_row
        if residual != 0:
            at_residual = tiles + 4 * _TILE_FILTERS * call.tile_row
            for m in range(filters):
                channel = integers(rows)[m] * call.residual_channel
                _fetch(call, at_residual + 4 * m * call.tile_row, first, end, residual + 4 * channel)

    lanes = call.lanes
    vectors = (end - first + lanes - 1) // lanes
    kernels = integers(call.kernels + 8 * TABLE_WIDTH * filters)
    runs = (vectors + kernels[0] - 1) // kernels[0]
    done = 0
    for run in range(runs):
        count = (vectors - done + runs - run - 1) // (runs - run)
        last = lanes * (count - 1)
        if run == runs - 1:
            last = end - first - lanes - lanes * done
        shift = 4 * lanes * done
        arguments = (
            x + shift, call.inputs + 8 * fields[_FIRST_INPUT], fields[_INPUTS], call.x_channel,
            call.ends,
            call.taps, call.tap_count, call.weight + 4 * fields[_FIRST_WEIGHT], call.bias + 4 * first_filter,
            at_out + shift, at_rows, out_stride, at_residual + shift if residual != 0 else 0, residual_stride,
            last, call.code, call.low, call.high,
        )  # fmt: skip
        call_kernel(kernels[count], arguments)
        done += count

    gap = first // call.row * call.row + call.columns
    for m in range(filters):
        place = out + 4 * integers(rows)[m] * call.out_channel
        if call.staged != 0:
            _place(call, tiles + 4 * m * call.tile_row, first, end, place)
        elif call.out_row > call.columns or call.out_top + call.out_bottom > 0:
            _clear_margins(call, first, end, gap, place)


@jit
def _first_block(call: Any, chunk: int) -> int:
    """The first block of a chunk: chunks have nearly equal work, so of equal blocks some have more."""
    blocks = integers(call.blocks)
    wanted = blocks[BLOCK_FIELDS * call.block_count + _WORK_BEFORE] * chunk // call.chunks
    low, high = 0, call.block_count
    while low < high:
        middle = (low + high) // 2
        if blocks[BLOCK_FIELDS * middle + _WORK_BEFORE] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _multiply_task(call: Any, task: int, tiles: int) -> None:
    chunk, rest = task % call.chunks, task // call.chunks
    strip, image = rest % call.strips, rest // call.strips
    vectors = (call.pixels + call.lanes - 1) // call.lanes
    first = strip * vectors // call.strips * call.lanes
    end = min((strip + 1) * vectors // call.strips * call.lanes, call.pixels)
    x = call.x + 4 * (image * call.x_image + first)
    if call.prefetch != 0:
        taps = integers(call.taps)
        reach = end - first + taps[call.tap_count - 1] - taps[0]
        for channel in range(call.channels):
            start = x + 4 * (channel * call.x_channel + taps[0])
            for line in range(start, start + 4 * reach, 64):
                prefetch(line)
    for block in range(_first_block(call, chunk), _first_block(call, chunk + 1)):
        _run_block(call, block, x, image, first, end, tiles)


@jit
def _run_task(call: Any, task: int, tiles: int) -> None:
    """One task of a step of any kind."""
    if call.kind == LAYER:
        _multiply_task(call, task, tiles)
    elif call.kind == POINTWISE:
        pointwise_task(call, task)
    elif call.kind == MEAN:
        mean_task(call, task)
    elif call.kind == PIXEL:
        image, chunk = task // call.chunks, task % call.chunks
        pixel_task(call, image, _first_block(call, chunk), _first_block(call, chunk + 1))
    else:
        window_task(call, task)


@jit
def _run_tasks(call: Any, slot: int) -> None:
    """Compute the step, one (image, strip, chunk) per task."""
    tiles = call.tiles + 4 * 2 * _TILE_FILTERS * call.tile_row * slot
    task = take(call.address + NEXT_TASK)
    while task < call.tasks:
        _run_task(call, task, tiles)
        task = take(call.address + NEXT_TASK)


@jit
def _run_image(calls: Any, start: int, steps: int, image: int) -> None:
    """Compute all steps of one image, the calls being those from number `start` on."""
    for step in range(start, start + steps):
        call = numba.carray(calls, start + steps)[step]
        if call.planes != 0:
            copy_image(call, image)
        for task in range(image * call.tasks, (image + 1) * call.tasks):
            _run_task(call, task, call.tiles)


@entry
def run_steps(calls: Any) -> None:
    """Compute the steps one after the other; what one has written, the next may read."""
    first = numba.carray(calls, 1)[0]
    steps, wait, alone, slot = first.steps, first.wait, first.alone, take(first.address + NEXT_SLOT)
    if alone != 0:
        image = take(first.address + NEXT_IMAGE)
        while image < alone:
            _run_image(calls, slot * steps, steps, image)
            image = take(first.address + NEXT_IMAGE)
        return
    for step in range(steps):
        call = numba.carray(calls, steps)[step]
        if call.planes != 0:
            copy_planes(call)
            if wait != 0:
                call_function(wait)
        _run_tasks(call, slot)
        if wait != 0 and step + 1 < steps:
            call_function(wait)
