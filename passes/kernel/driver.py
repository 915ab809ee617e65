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
def _copy_row(call: Any, to: int, source: int, phase_column: int) -> None:
    """Fill one row of a plane: every stride-th pixel of a row of the picture, and zeros around it."""
    there, here = _floats(to), _floats(source)
    step, shift = call.stride_width, phase_column - call.shift_left
    first = min(max(0, (-shift + step - 1) // step), call.plane_row)
    end = max(first, min(call.plane_row, (call.width - shift + step - 1) // step))
    for column in range(first):
        there[column] = np.float32(0)
    if step == 1:
        _copy(to + 4 * first, source + 4 * (first + shift), end - first)
    elif step == 2 and end - first >= 4:
        for column in range(first, end - 3, 4):
            _copy_every_other(to + 4 * column, source + 4 * (2 * column + shift))
        _copy_every_other(to + 4 * (end - 4), source + 4 * (2 * (end - 4) + shift))
    else:
        for column in range(first, end):
            there[column] = here[column * step + shift]
    for column in range(end, call.plane_row):
        there[column] = np.float32(0)


@_jit
def _copy_channel(call: Any, task: int) -> None:
    image, channel = task // call.channels, task % call.channels
    picture = call.picture + 4 * (image * call.picture_image + channel * call.picture_channel)
    planes = call.planes + 4 * (image * call.planes_image + channel * call.planes_channel)
    phases = _integers(call.phases)
    for phase in range(call.phase_count):
        for row in range(call.plane_rows):
            to = planes + 4 * (phase * call.planes_phase + row * call.plane_row)
            line = row * call.stride_height + phases[2 * phase] - call.shift_top
            if 0 <= line < call.height:
                _copy_row(call, to, picture + 4 * line * call.picture_row, phases[2 * phase + 1])
            else:
                _clear(to, call.plane_row)


@_jit
def _first_row(call: Any, pixel: int) -> int:
    """The first row that ends behind `pixel`, or the one before it."""
    image = pixel // call.image_pixels
    within = min((pixel - image * call.image_pixels) // call.row, call.rows_per_image - 1)
    return image * call.rows_per_image + within


@_jit
def _row_start(call: Any, row: int) -> int:
    return row // call.rows_per_image * call.image_pixels + row % call.rows_per_image * call.row


@_jit
def _place(call: Any, tile: int, first: int, end: int, out: int) -> None:
    """Copy pixels ``first … end`` of one filter from its tile into the picture, and clear the margins they touch."""
    gap, per_image = call.out_row - call.columns, call.rows_per_image
    row = _first_row(call, first)
    while row < call.rows:
        start = _row_start(call, row)
        if start >= end:
            return
        left, right = max(start, first), min(start + call.columns, end)
        line = out + 4 * (row // per_image * call.out_image + row % per_image * call.out_row)
        if left < right:
            _copy(line + 4 * (left - start), tile + 4 * (left - first), right - left)
            if left == start and row % per_image == 0:
                _clear(line - 4 * call.out_top * call.out_row, call.out_top * call.out_row)
            if right == start + call.columns:
                below = call.out_bottom if row % per_image == per_image - 1 else 0
                _clear(line + 4 * call.columns, gap + below * call.out_row)
        row += 1


@_jit
def _fetch(call: Any, tile: int, first: int, end: int, residual: int) -> None:
    """Copy what is to be added to pixels ``first … end`` of one filter into its tile."""
    per_image = call.rows_per_image
    row = _first_row(call, first)
    while row < call.rows:
        start = _row_start(call, row)
        if start >= end:
            return
        left, right = max(start, first), min(start + call.columns, end)
        line = residual + 4 * (row // per_image * call.residual_image + row % per_image * call.residual_row)
        if left < right:
            _copy(tile + 4 * (left - first), line + 4 * (left - start), right - left)
        row += 1


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
    """Copy one (image, channel) per task into padded planes, split into the phases of the stride."""
    call = numba.carray(calls, 1)[0]
    tasks = call.images * call.channels
    task = _take(call.address + _NEXT_TASK)
    while task < tasks:
        _copy_channel(call, task)
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
