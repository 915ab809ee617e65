"""What the compiled loops are made of: decorators, memory at addresses, short copies.

numba compiles these functions into the loops of `planes` and `driver`. Memory is named by its address, as the `Call`
gives it. Rows of a picture are short, so they are copied and cleared four numbers at a time, the last four overlapping.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from passes.kernel.codegen import cache
from passes.kernel.runtime.call_record import Call

_RECORD = types.CPointer(numba.from_dtype(np.dtype(Call)))
NEXT_COPY, NEXT_TASK = Call.next_copy.offset, Call.next_task.offset
NEXT_SLOT, NEXT_IMAGE = Call.next_slot.offset, Call.next_image.offset


def jit(function: Any) -> Any:
    """Compile a function that only compiled functions call."""
    return numba.njit(error_model="numpy", nogil=True)(function)


def entry(function: Any) -> Any:
    """Compile a function of the first `Call` of an array, or load it from the kernel's own cache."""
    place, before = cache.directory(), numba.config.CACHE_DIR
    signature = types.void(_RECORD)
    if place is not None:
        numba.config.CACHE_DIR = str(place)
        try:
            with suppress(Exception):  # numba stops at a full disk and at files that it can't read
                return numba.cfunc(signature, cache=True, error_model="numpy")(function)
        finally:
            numba.config.CACHE_DIR = before
    return numba.cfunc(signature, error_model="numpy")(function)


@intrinsic
def floats(typing: Any, address: Any) -> Any:
    """View memory at an address as fp32 numbers."""
    return types.CPointer(types.float32)(address), _cast


@intrinsic
def integers(typing: Any, address: Any) -> Any:
    """View memory at an address as int64 numbers."""
    return types.CPointer(types.int64)(address), _cast


def _cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def take(typing: Any, address: Any) -> Any:
    """Return the counter at `address` and count it up, atomically."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def call_kernel(typing: Any, function: Any, arguments: Any) -> Any:
    """Call an emitted function at an address with a tuple of integers, addresses among them, and numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = [context.get_value_type(each) for each in signature.args[1]]
        kind = ir.FunctionType(ir.VoidType(), kinds)
        values = cgutils.unpack_tuple(builder, args[1])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def call_function(typing: Any, function: Any) -> Any:
    """Call the C function ``void f(void)`` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _four_numbers(builder: Any, address: Any, shift: int) -> tuple[Any, Any]:
    four = ir.VectorType(ir.FloatType(), 4)
    address = builder.add(address, address.type(4 * shift))
    pointer = builder.inttoptr(address, four.as_pointer())
    return pointer, ir.VectorType(ir.IntType(32), 4)


@intrinsic
def copy_four(typing: Any, to: Any, source: Any) -> Any:
    """Copy four numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (there, _), (here, _) = (_four_numbers(builder, address, 0) for address in args)
        builder.store(builder.load(here, align=4), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def clear_four(typing: Any, address: Any) -> Any:
    """Set four numbers to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        there, _ = _four_numbers(builder, args[0], 0)
        builder.store(ir.VectorType(ir.FloatType(), 4)([0.0] * 4), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
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
def copy_every_other(typing: Any, to: Any, source: Any) -> Any:
    """Copy numbers 0, 2, 4 and 6."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        there, indices = _four_numbers(builder, args[0], 0)
        low, high = (builder.load(_four_numbers(builder, args[1], shift)[0], align=4) for shift in (0, 3))
        builder.store(builder.shuffle_vector(low, high, indices([0, 2, 5, 7])), there, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@jit
def clear(address: int, count: int) -> None:
    """Set `count` numbers to zero."""
    if count >= 4:
        for index in range(0, count - 3, 4):
            clear_four(address + 4 * index)
        clear_four(address + 4 * (count - 4))
    else:
        numbers = floats(address)
        for index in range(count):
            numbers[index] = np.float32(0)


@jit
def copy(to: int, source: int, count: int) -> None:
    """Copy `count` numbers: rows of a picture are short, so four at a time, the last four overlapping."""
    if count >= 4:
        for index in range(0, count - 3, 4):
            copy_four(to + 4 * index, source + 4 * index)
        copy_four(to + 4 * (count - 4), source + 4 * (count - 4))
    else:
        there, here = floats(to), floats(source)
        for index in range(count):
            there[index] = here[index]


@jit
def copy_strided(to: int, source: int, count: int, step: int) -> None:
    """Copy every step-th of the numbers at `source`."""
    if step == 1:
        copy(to, source, count)
    elif step == 2 and count >= 4:
        for column in range(0, count - 3, 4):
            copy_every_other(to + 4 * column, source + 8 * column)
        copy_every_other(to + 4 * (count - 4), source + 8 * (count - 4))
    else:
        there, here = floats(to), floats(source)
        for column in range(count):
            there[column] = here[column * step]
