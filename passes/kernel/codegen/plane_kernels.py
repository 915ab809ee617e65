"""The kernels of steps that take each channel for itself, as LLVM IR; a *plane* is one channel's picture.

- ``pointwise``: ``out = act(x ∘ y)`` over a plane; ∘ is a sum, a product, a product with one number, or nothing.
- ``mean``: the mean of a plane.
- ``pixel``: a piece of up to eight filters on pictures of one pixel, where the vector holds the filters:
  ``out[rows[m]] = act(bias[m] + Σ_k w[k, m] · x[inputs[k]] + residual[rows[m]])``, summed in the micro-kernels' order,
  so that both give the same numbers.

Planes have rows at a stride of their own. Rests of a row are masked, so a row may have any length.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from passes.kernel.codegen import activations
from passes.kernel.codegen.emitter import F32, I64, POINTER, Emitter
from passes.kernel.codegen.target import MOST_FILTERS

COMBINE = ("nothing", "sum", "product", "gate")  # what a pointwise step does with its second input, by its number
_END: tuple[tuple[str, Any], ...] = (("code", I64), ("low", F32), ("high", F32))
POINTWISE: tuple[tuple[str, Any], ...] = (
    *(("x", POINTER), ("y", POINTER), ("out", POINTER)),
    *(("rows", I64), ("columns", I64), ("x_row", I64), ("y_row", I64), ("out_row", I64), ("combine", I64)),
    *_END,
)
MEAN: tuple[tuple[str, Any], ...] = (
    *(("x", POINTER), ("rows", I64), ("columns", I64), ("x_row", I64), ("out", POINTER)),
)
PIXEL: tuple[tuple[str, Any], ...] = (
    *(("x", POINTER), ("inputs", POINTER), ("input_count", I64), ("x_channel", I64)),
    *(("weight", POINTER), ("bias", POINTER), ("filters", I64), ("rows", POINTER)),
    *(("out", POINTER), ("out_channel", I64), ("residual", POINTER), ("residual_channel", I64)),
    *_END,
)


def emit_plane_kernels(module: ir.Module, lanes: int) -> None:
    """Emit all of them into `module`."""
    _pointwise(Emitter(module, lanes, "sgfx_pointwise", POINTWISE))
    _mean(Emitter(module, lanes, "sgfx_mean", MEAN))
    _pixel(Emitter(module, MOST_FILTERS, "sgfx_pixel", PIXEL))


def _pointwise(e: Emitter) -> None:
    """A loop of its own for each way to combine and each kind of activation: nothing is asked within."""
    b = e.b
    for number, combine in enumerate(COMBINE):
        for is_clamp in (True, False):
            here, other = b.append_basic_block(combine), b.append_basic_block("other")
            kind = b.icmp_signed("==", e.arg["code"], I64(0))
            chosen = b.icmp_signed("==", e.arg["combine"], I64(number))
            b.cbranch(b.and_(chosen, kind if is_clamp else b.not_(kind)), here, other)
            b.position_at_end(here)
            _combine_rows(e, combine, is_clamp)
            b.ret_void()
            b.position_at_end(other)
    b.ret_void()


def _combine_rows(e: Emitter, combine: str, is_clamp: bool) -> None:
    b, arg, zero = e.b, e.arg, e.constant(0.0)
    factor = e.splat(e.load(arg["y"], I64(0), F32)) if combine == "gate" else zero
    with e.loop(I64(0), arg["rows"]) as row:
        x, y, out = (e.address(arg[name], b.mul(row.index, arg[f"{name}_row"])) for name in ("x", "y", "out"))
        with e.loop(I64(0), arg["columns"], e.lanes) as column:
            mask = e.lanes_below(column.index, arg["columns"])
            value = e.load_where(mask, x, column.index, zero)
            if combine in ("sum", "product"):
                other = e.load_where(mask, y, column.index, zero)
                value = b.fadd(value, other) if combine == "sum" else b.fmul(value, other)
            elif combine == "gate":
                value = b.fmul(value, factor)
            e.store_where(mask, activated(e, value, is_clamp), out, column.index)


def activated(e: Emitter, value: Any, is_clamp: bool) -> Any:
    """The activation of a value: the arguments ``low`` and ``high``, or that of ``code``."""
    if is_clamp:
        return activations.clamp(e.b, value, e.splat(e.arg["low"]), e.splat(e.arg["high"]))
    return activations.emit(e, value, e.arg["code"])


def _mean(e: Emitter) -> None:
    b, arg, zero = e.b, e.arg, e.constant(0.0)
    with e.loop(I64(0), arg["rows"], carried=[zero]) as row:
        x = e.address(arg["x"], b.mul(row.index, arg["x_row"]))
        with e.loop(I64(0), arg["columns"], e.lanes, carried=row.values) as column:
            mask = e.lanes_below(column.index, arg["columns"])
            column.values = [b.fadd(column.values[0], e.load_where(mask, x, column.index, zero))]
        row.values = column.values
    total, half = row.values[0], e.lanes // 2
    while half:
        indices = ir.VectorType(ir.IntType(32), e.lanes)([(lane + half) % e.lanes for lane in range(e.lanes)])
        total, half = b.fadd(total, b.shuffle_vector(total, total, indices)), half // 2
    count = b.sitofp(b.mul(arg["rows"], arg["columns"]), F32)
    b.store(b.fdiv(b.extract_element(total, ir.IntType(32)(0)), count), arg["out"], align=4)
    b.ret_void()


def _pixel(e: Emitter) -> None:
    b, arg = e.b, e.arg
    buffer = b.inttoptr(b.ptrtoint(b.alloca(e.vector), I64), POINTER)  # untyped: numbers are stored there too
    filters = e.lanes_below(I64(0), arg["filters"])
    start = e.load_where(filters, arg["bias"], I64(0), e.constant(0.0))
    with e.loop(I64(0), arg["input_count"], carried=[start]) as turn:
        channel = e.load(arg["inputs"], turn.index, I64)
        x = e.splat(e.load(arg["x"], b.mul(channel, arg["x_channel"]), F32))
        weight = e.load_where(filters, arg["weight"], b.mul(turn.index, arg["filters"]), e.constant(0.0))
        turn.values = [e.fma(weight, x, turn.values[0])]
    e.store(turn.values[0], buffer, I64(0))
    with b.if_then(e.is_given("residual")), e.loop(I64(0), arg["filters"]) as m:
        row = b.mul(e.load(arg["rows"], m.index, I64), arg["residual_channel"])
        total = b.fadd(e.load(buffer, m.index, F32), e.load(arg["residual"], row, F32))
        b.store(total, e.address(buffer, m.index), align=4)
    value = e.load(buffer, I64(0), e.vector)
    with b.if_else(b.icmp_signed("==", arg["code"], I64(0))) as (clamped, otherwise):
        with clamped:
            e.store(activated(e, value, True), buffer, I64(0))
        with otherwise:
            e.store(activated(e, value, False), buffer, I64(0))
    with e.loop(I64(0), arg["filters"]) as m:
        row = b.mul(e.load(arg["rows"], m.index, I64), arg["out_channel"])
        b.store(e.load(buffer, m.index, F32), e.address(arg["out"], row), align=4)
    b.ret_void()
