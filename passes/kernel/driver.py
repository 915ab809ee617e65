"""The compiled loops around the micro-kernels: copy the planes if needed, then strips of pixels × blocks of filters.

Every thread of a call runs the same function on the same `Call` and takes tasks off a shared counter until none is
left, so a thread that is held up holds up nobody, and one thread alone does all the work.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from passes.kernel import cache
from passes.kernel.call import Call
from passes.kernel.emission import ARGUMENTS, SIGNATURE
from passes.kernel.library import TABLE_WIDTH
from passes.kernel.packing import BLOCK_FIELDS

_FILTERS, _INPUTS, _FIRST_INPUT, _FIRST_FILTER, _FIRST_WEIGHT, _WORK_BEFORE = range(BLOCK_FIELDS)
_NEXT_TASK, _NEXT_SLOT = Call.next_task.offset, Call.next_slot.offset
_RECORD = types.CPointer(numba.from_dtype(np.dtype(Call)))
_TILE_FILTERS = 8


@intrinsic
def _floats(typing: Any, address: Any) -> Any:
    """View memory at an address as fp32 numbers."""
    return types.CPointer(types.float32)(address), _cast


@intrinsic
def _integers(typing: Any, address: Any) -> Any:
    """View memory at an address as int64 numbers."""
    return types.CPointer(types.int64)(address), _cast


def _cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def _take(typing: Any, address: Any) -> Any:
    """Return the counter at `address` and count it up, atomically."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), codegen


def _four_numbers(builder: Any, address: Any, shift: int) -> tuple[Any, Any]:
    four = ir.VectorType(ir.FloatType(), 4)
    address = builder.add(address, address.type(4 * shift))
    pointer = builder.inttoptr(address, four.as_pointer())
    return pointer, ir.VectorType(ir.IntType(32), 4)


@intrinsic
def _copy_four(typing: Any, to: Any, source: Any) -> Any:
    """Copy four numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (there, _), (here, _) = (_four_numbers(builder, address, 0) for address in args)
        builder.store(builder.load(here, align=4), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _clear_four(typing: Any, address: Any) -> Any:
    """Set four numbers to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        there, _ = _four_numbers(builder, args[0], 0)
        builder.store(ir.VectorType(ir.FloatType(), 4)([0.0] * 4), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Ask for a line of memory, to be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = ir.PointerType(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, soon, data = number(0), number(2), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), to_read, soon, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _copy_every_other(typing: Any, to: Any, source: Any) -> Any:
    """Copy numbers 0, 2, 4 and 6."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        there, indices = _four_numbers(builder, args[0], 0)
        low, high = (builder.load(_four_numbers(builder, args[1], shift)[0], align=4) for shift in (0, 3))
        builder.store(builder.shuffle_vector(low, high, indices([0, 2, 5, 7])), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _micro_kernel(typing: Any, function: Any, arguments: Any) -> Any:
    """Call the micro-kernel at an address with a tuple of `ARGUMENTS`."""
    kinds = [types.float32 if kind == ir.FloatType() else types.int64 for _, kind in ARGUMENTS]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            builder.inttoptr(value, kind) if isinstance(kind, ir.PointerType) else value
            for value, kind in zip(cgutils.unpack_tuple(builder, args[1]), SIGNATURE.args, strict=True)
        ]
        builder.call(builder.inttoptr(args[0], SIGNATURE.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.Tuple(kinds)), codegen


def _jit(function: Any) -> Any:
    return numba.njit(error_model="numpy", nogil=True)(function)


@_jit
def _clear(address: int, count: int) -> None:
    if count >= 4:
        for index in range(0, count - 3, 4):
            _clear_four(address + 4 * index)
        _clear_four(address + 4 * (count - 4))
    else:
        numbers = _floats(address)
        for index in range(count):
            numbers[index] = np.float32(0)


@_jit
def _copy(to: int, source: int, count: int) -> None:
    """Copy `count` numbers: rows of a picture are short, so four at a time, the last four overlapping."""
    if count >= 4:
        for index in range(0, count - 3, 4):
            _copy_four(to + 4 * index, source + 4 * index)
        _copy_four(to + 4 * (count - 4), source + 4 * (count - 4))
    else:
        there, here = _floats(to), _floats(source)
        for index in range(count):
            there[index] = here[index]


@_jit
def _copy_row(to: int, source: int, count: int, step: int) -> None:
    """Copy every step-th of the numbers at `source`."""
    if step == 1:
        _copy(to, source, count)
    elif step == 2 and count >= 4:
        for column in range(0, count - 3, 4):
            _copy_every_other(to + 4 * column, source + 8 * column)
        _copy_every_other(to + 4 * (count - 4), source + 8 * (count - 4))
    else:
        there, here = _floats(to), _floats(source)
        for column in range(count):
            there[column] = here[column * step]


@_jit
def _copy_phase(call: Any, picture: int, plane: int, down: int, right: int) -> None:
    """Fill one plane of a channel: pixels ``step · i + down, step · j + right`` of its padded picture."""
    step, shift, row = call.stride_width, right - call.shift_left, call.plane_row
    first = min(max(0, (-shift + step - 1) // step), row)
    end = max(first, min(row, (call.width - shift + step - 1) // step))
    for line in range(call.plane_rows):
        to, there = plane + 4 * line * row, line * call.stride_height + down - call.shift_top
        if there < 0 or there >= call.height:
            _clear(to, row)
            continue
        source = picture + 4 * (there * call.picture_row + first * step + shift)
        _clear(to, first)
        _copy_row(to + 4 * first, source, end - first, step)
        _clear(to + 4 * end, row - end)


@_jit
def _copy_channels(call: Any, task: int) -> None:
    """Fill the planes of `copied_at_once` channels of an image."""
    parts = (call.channels + call.copied_at_once - 1) // call.copied_at_once
    image, start = task // parts, task % parts * call.copied_at_once
    pictures, planes = call.picture + 4 * image * call.picture_image, call.planes + 4 * image * call.planes_image
    phases = _integers(call.phases)
    for channel in range(start, min(start + call.copied_at_once, call.channels)):
        picture, plane = pictures + 4 * channel * call.picture_channel, planes + 4 * channel * call.planes_channel
        if call.one_pixel != 0:
            _floats(plane)[0] = _floats(picture)[0]
            continue
        for phase in range(call.phase_count):
            down, right = phases[2 * phase], phases[2 * phase + 1]
            _copy_phase(call, picture, plane + 4 * phase * call.planes_phase, down, right)


@_jit
def _first_row(call: Any, pixel: int) -> tuple[int, int]:
    """The image and the row in it that contain `pixel`, or in whose margin it lies."""
    image = pixel // call.image_pixels
    return image, min((pixel - image * call.image_pixels) // call.row, call.rows_per_image - 1)


@_jit
def _place(call: Any, tile: int, first: int, end: int, out: int) -> None:
    """Copy pixels ``first … end`` of one filter from its tile into the picture, and clear the margins they touch."""
    image, row = _first_row(call, first)
    start = image * call.image_pixels + row * call.row
    while start < end:
        left, right = max(start, first), min(start + call.columns, end)
        line = out + 4 * (image * call.out_image + row * call.out_row)
        if left < right:
            _copy(line + 4 * (left - start), tile + 4 * (left - first), right - left)
            if left == start and row == 0:
                _clear(line - 4 * call.out_top * call.out_row, call.out_top * call.out_row)
            if right == start + call.columns:
                below = call.out_bottom if row == call.rows_per_image - 1 else 0
                _clear(line + 4 * call.columns, call.out_row - call.columns + below * call.out_row)
        row += 1
        start += call.row
        if row == call.rows_per_image:
            image, row, start = image + 1, 0, (image + 1) * call.image_pixels
            if image == call.rows // call.rows_per_image:
                return


@_jit
def _fetch(call: Any, tile: int, first: int, end: int, residual: int) -> None:
    """Copy what is to be added to pixels ``first … end`` of one filter into its tile."""
    image, row = _first_row(call, first)
    start = image * call.image_pixels + row * call.row
    while start < end:
        left, right = max(start, first), min(start + call.columns, end)
        line = residual + 4 * (image * call.residual_image + row * call.residual_row)
        if left < right:
            _copy(tile + 4 * (left - first), line + 4 * (left - start), right - left)
        row += 1
        start += call.row
        if row == call.rows_per_image:
            image, row, start = image + 1, 0, (image + 1) * call.image_pixels
            if image == call.rows // call.rows_per_image:
                return


@_jit
def _clear_margins(call: Any, first: int, end: int, gap: int, out: int) -> None:
    """Clear what lies beside, above and below pixels ``first … end``, which were computed where they belong.

    `gap` is the first pixel of the margin beside the row of pixel `first`.
    """
    whole = call.rows * call.row
    if first == 0:
        _clear(out - 4 * call.out_top * call.out_row, call.out_top * call.out_row)
    if end == call.pixels:
        _clear(out + 4 * whole, call.out_bottom * call.out_row)
        end = whole
    numbers = _floats(out)
    for column in range(call.row - call.columns):  # down each column: a row's margin is too short to loop over
        start = gap + column
        if start < first:
            start += call.row
        for pixel in range(start, end, call.row):
            numbers[pixel] = np.float32(0)


@_jit
def _run_block(call: Any, block: int, x: int, image: int, first: int, end: int, tiles: int) -> None:
    """Compute pixels ``first … end`` of the filters of one block: runs of vectors of nearly equal length."""
    fields = _integers(call.blocks + 8 * BLOCK_FIELDS * block)
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
                channel = _integers(rows)[m] * call.residual_channel
                _fetch(call, at_residual + 4 * m * call.tile_row, first, end, residual + 4 * channel)

    lanes = call.lanes
    vectors = (end - first + lanes - 1) // lanes
    kernels = _integers(call.kernels + 8 * TABLE_WIDTH * filters)
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
            call.taps, call.tap_count, call.weight + 4 * fields[_FIRST_WEIGHT], call.bias + 4 * first_filter,
            at_out + shift, at_rows, out_stride, at_residual + shift if residual != 0 else 0, residual_stride,
            last, call.code, call.low, call.high,
        )  # fmt: skip
        _micro_kernel(kernels[count], arguments)
        done += count

    gap = first // call.row * call.row + call.columns
    for m in range(filters):
        place = out + 4 * _integers(rows)[m] * call.out_channel
        if call.staged != 0:
            _place(call, tiles + 4 * m * call.tile_row, first, end, place)
        elif call.out_row > call.columns or call.out_top + call.out_bottom > 0:
            _clear_margins(call, first, end, gap, place)


@_jit
def _first_block(call: Any, chunk: int) -> int:
    """The first block of a chunk: chunks have nearly equal work, so of equal blocks some have more."""
    blocks = _integers(call.blocks)
    wanted = blocks[BLOCK_FIELDS * call.block_count + _WORK_BEFORE] * chunk // call.chunks
    low, high = 0, call.block_count
    while low < high:
        middle = (low + high) // 2
        if blocks[BLOCK_FIELDS * middle + _WORK_BEFORE] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _multiply_task(call: Any, task: int, tiles: int) -> None:
    chunk, rest = task % call.chunks, task // call.chunks
    strip, image = rest % call.strips, rest // call.strips
    vectors = (call.pixels + call.lanes - 1) // call.lanes
    first = strip * vectors // call.strips * call.lanes
    end = min((strip + 1) * vectors // call.strips * call.lanes, call.pixels)
    x = call.x + 4 * (image * call.x_image + first)
    if call.prefetch != 0:
        taps = _integers(call.taps)
        reach = end - first + taps[call.tap_count - 1] - taps[0]
        for channel in range(call.channels):
            start = x + 4 * (channel * call.x_channel + taps[0])
            for line in range(start, start + 4 * reach, 64):
                _prefetch(line)
    for block in range(_first_block(call, chunk), _first_block(call, chunk + 1)):
        _run_block(call, block, x, image, first, end, tiles)


def _compile(function: Any) -> Any:
    """Compile a function of one `Call`, or load it from the kernel's own cache."""
    place, before = cache.directory(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(place or "")
    try:
        return numba.cfunc(types.void(_RECORD), cache=place is not None, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before


@_compile
def copy_planes(calls: Any) -> None:
    """Copy the channels of an image into padded planes, split into the phases of the stride, some at a time."""
    call = numba.carray(calls, 1)[0]
    tasks = call.images * ((call.channels + call.copied_at_once - 1) // call.copied_at_once)
    task = _take(call.address + _NEXT_TASK)
    while task < tasks:
        _copy_channels(call, task)
        task = _take(call.address + _NEXT_TASK)


@_compile
def multiply(calls: Any) -> None:
    """Compute the layer, one (image, strip, chunk) per task."""
    call = numba.carray(calls, 1)[0]
    slot = _take(call.address + _NEXT_SLOT)
    tiles = call.tiles + 4 * 2 * _TILE_FILTERS * call.tile_row * slot
    task = _take(call.address + _NEXT_TASK)
    while task < call.tasks:
        _multiply_task(call, task, tiles)
        task = _take(call.address + _NEXT_TASK)
