"""The kernels of layers and poolings that move a window over each channel for itself, as LLVM IR.

``out[r, c] = act(bias + Σ_{i, j} w[i, j] · x[r·s_h + i·d_h − top, c·s_w + j·d_w − left])``, or the largest of the same
pixels in place of the sum. Unlike the micro-kernels, these read the picture as it is, whatever the stride: of what lies
outside, rows are skipped and columns masked. Four channels are computed at once: sums need not wait for each other.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from passes.kernel.codegen import activations
from passes.kernel.codegen.emitter import F32, I64, POINTER, Emitter
from passes.kernel.runtime.call_record import Call

AT_ONCE = 4  # channels
STRIDES = (1, 2)  # horizontal ones that there are kernels for
# The picture's sizes are read from the `Call` at address `call`; x and out are addresses of first pixels of channel 0.
WINDOW: tuple[tuple[str, Any], ...] = (
    *(("call", POINTER), ("x", POINTER), ("inputs", POINTER), ("out", POINTER), ("filters", POINTER)),
    *(("weight", POINTER), ("bias", POINTER)),
)


def window_symbol(channels: int, stride: int, largest: bool) -> str:
    """Name of a kernel in its object file."""
    return f"sgfx_{'largest' if largest else 'window'}_{channels}_{stride}"


def emit_window_kernels(module: ir.Module, lanes: int) -> None:
    """Emit all of them into `module`."""
    for channels in (1, AT_ONCE):
        for stride in STRIDES:
            for largest in (False, True):
                _Window(module, lanes, channels, stride, largest).emit()


class _Window(Emitter):
    def __init__(self, module: ir.Module, lanes: int, channels: int, stride: int, largest: bool) -> None:
        super().__init__(module, lanes, window_symbol(channels, stride, largest), WINDOW)
        self.channels, self.stride, self.largest = range(channels), stride, largest
        names = ("picture_channel", "picture_row", "height", "width", "stride_height", "shift_top", "shift_left",
                 "kernel_height", "kernel_width", "dilation_height", "dilation_width", "rows", "columns",
                 "out_channel", "out_row", "tap_count", "code")  # fmt: skip
        self.of = {name: self._field(name, I64) for name in names}
        self.low, self.high = (self.splat(self._field(name, F32)) for name in ("low", "high"))
        self.x = [self._plane("x", "inputs", "picture_channel", channel) for channel in self.channels]
        self.out = [self._plane("out", "filters", "out_channel", channel) for channel in self.channels]
        taps = [self.b.mul(I64(channel), self.of["tap_count"]) for channel in self.channels]
        self.weight = [self.address(self.arg["weight"], at) for at in taps]

    def emit(self) -> None:
        """Row by row, vector by vector."""
        b, of = self.b, self.of
        start = [self._start(channel) for channel in self.channels]
        with self.loop(I64(0), of["rows"]) as row:
            top = b.sub(b.mul(row.index, of["stride_height"]), of["shift_top"])
            down = of["dilation_height"]
            first = self._at_least_zero(self._ceiling(b.neg(top), down))
            end = self._at_least_zero(self._ceiling(b.sub(of["height"], top), down))
            end = b.select(b.icmp_signed("<", end, of["kernel_height"]), end, of["kernel_height"])
            line = b.mul(row.index, of["out_row"])
            with self.loop(I64(0), of["columns"], self.lanes) as column:
                total = self._over_window(start, top, first, end, column.index)
                mask = self.lanes_below(column.index, of["columns"])
                at = b.add(line, column.index)
                for channel, value in enumerate(self._activated(total)):
                    self.store_where(mask, value, self.out[channel], at)
        b.ret_void()

    def _over_window(self, start: list[Any], top: Any, first: Any, end: Any, column: Any) -> list[Any]:
        b, of = self.b, self.of
        left = b.sub(b.mul(column, I64(self.stride)), of["shift_left"])
        with self.loop(first, end, carried=start) as i:
            line = b.mul(b.add(top, b.mul(i.index, of["dilation_height"])), of["picture_row"])
            tap = b.mul(i.index, of["kernel_width"])
            with self.loop(I64(0), of["kernel_width"], carried=i.values) as j:
                at = b.add(left, b.mul(j.index, of["dilation_width"]))
                pixels = self._pixels(line, at)
                j.values = [
                    self._joined(channel, b.add(tap, j.index), x, j.values[channel])
                    for channel, x in zip(self.channels, pixels, strict=True)
                ]
            i.values = j.values
        total: list[Any] = i.values
        return total

    def _pixels(self, line: Any, at: Any) -> list[Any]:
        """A vector of pixels of every channel, from column `at` on; with a stride, every other one of two vectors."""
        outside = self.constant(-math.inf if self.largest else 0.0)
        parts = []
        for part in range(self.stride):
            column = self.b.add(at, I64(part * self.lanes))
            mask, where = self.lanes_below(column, self.of["width"]), self.b.add(line, column)
            parts.append([self.load_where(mask, self.x[channel], where, outside) for channel in self.channels])
        if self.stride == 1:
            return parts[0]
        every = ir.VectorType(ir.IntType(32), self.lanes)(list(range(0, 2 * self.lanes, 2)))
        return [self.b.shuffle_vector(low, high, every) for low, high in zip(*parts, strict=True)]

    def _joined(self, channel: int, tap: Any, x: Any, total: Any) -> Any:
        """The sum or the largest with one pixel more; NaN stays, as it does in torch."""
        b = self.b
        if not self.largest:
            return self.fma(self.splat(self.load(self.weight[channel], tap, F32)), x, total)
        larger = b.or_(b.fcmp_ordered(">", x, total), b.fcmp_unordered("uno", x, x))
        return b.select(larger, x, total)

    def _activated(self, values: list[Any]) -> list[Any]:
        b, before = self.b, self.b.block
        clamped = [activations.clamp(b, x, self.low, self.high) for x in values]
        general, after = b.append_basic_block("general"), b.append_basic_block("after")
        b.cbranch(b.icmp_signed("==", self.of["code"], I64(0)), after, general)
        b.position_at_end(general)
        others = [activations.emit(self, x, self.of["code"]) for x in values]
        b.branch(after)
        b.position_at_end(after)
        found = [b.phi(self.vector) for _ in values]
        for phi, one, other in zip(found, clamped, others, strict=True):
            phi.add_incoming(one, before)
            phi.add_incoming(other, general)
        return found

    def _start(self, channel: int) -> Any:
        if self.largest:
            return self.constant(-math.inf)
        return self.splat(self.load(self.arg["bias"], I64(channel), F32))

    def _plane(self, name: str, table: str, stride: str, channel: int) -> Any:
        number = self.load(self.arg[table], I64(channel), I64)
        return self.address(self.arg[name], self.b.mul(number, self.of[stride]))

    def _field(self, name: str, kind: Any) -> Any:
        offset: int = getattr(Call, name).offset
        return self.b.load(self.address(self.arg["call"], I64(offset), ir.IntType(8)), align=4, typ=kind)

    def _ceiling(self, number: Any, by: Any) -> Any:
        """``number / by`` rounded up, or to zero if it is negative."""
        return self.b.sdiv(self.b.add(number, self.b.sub(by, I64(1))), by)

    def _at_least_zero(self, number: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", number, I64(0)), number, I64(0))
