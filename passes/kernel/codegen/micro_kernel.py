"""The micro-kernel, as LLVM IR.

One call computes a tile of `filters` filters × `vectors` vectors of consecutive pixels::

    out[rows[m]·out_stride + at[v]] = act(bias[m] + Σ_k Σ_t w[k, t, m] · x[inputs[k]·channel_stride + taps[t] + at[v]]
                                          + residual[rows[m]·residual_stride + at[v]])

If ``ends`` is given, every input is first kept between two numbers of its own: ``max(min(x, ends[k, 1]), ends[k, 0])``.

There is ``at[v] = v·lanes``, but ``at[vectors − 1] = last``: the last vector of a row of pixels overlaps the one before
instead of ending in a mask. The accumulators stay in registers over the whole sum. ``inputs`` gathers the channels of a
group and ``rows`` puts its filters in place, so both permutations of eq. 17 are address arithmetic.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from passes.kernel.codegen import activations
from passes.kernel.codegen.emitter import F32, I32, I64, POINTER, Emitter, join
from passes.kernel.codegen.target import MOST_FILTERS, Target

# Weights are read once from end to end. What lies this far ahead is asked for: the processor does so by itself, but not
# beyond the page it is in; a twentieth of ResNet-50's time.
_AHEAD = 2048 // 4

# The arguments of a micro-kernel, in order. `residual` may be null; strides and offsets count numbers, not bytes.
ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("x", POINTER),
    ("inputs", POINTER),  # int64 [input_count]
    ("input_count", I64),  # may be 0: then the sum is the bias
    ("channel_stride", I64),
    ("ends", POINTER),  # float [in_channels, 2]; may be null
    ("taps", POINTER),  # int64 [tap_count]
    ("tap_count", I64),  # at least 1
    ("weight", POINTER),  # float [input_count, tap_count, filters]
    ("bias", POINTER),  # float [filters]
    ("out", POINTER),
    ("rows", POINTER),  # int64 [filters]
    ("out_stride", I64),
    ("residual", POINTER),
    ("residual_stride", I64),
    ("last", I64),
    ("code", I64),  # of the activation
    ("low", F32),
    ("high", F32),
)


def symbol(filters: int, vectors: int) -> str:
    """Name of a micro-kernel in its object file."""
    return f"sgfx_{filters}x{vectors}"


def emit_micro_kernels(module: ir.Module, target: Target) -> None:
    """Emit every micro-kernel of a target into `module`."""
    for filters in range(1, MOST_FILTERS + 1):
        for vectors in range(1, target.most_vectors(filters) + 1):
            _MicroKernel(module, target.lanes, filters, vectors).emit()


class _MicroKernel(Emitter):
    """Emits one micro-kernel into `module`."""

    def __init__(self, module: ir.Module, lanes: int, filters: int, vectors: int) -> None:
        super().__init__(module, lanes, symbol(filters, vectors), ARGUMENTS)
        self.filters, self.vectors = filters, vectors
        self.prefetch = self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32])
        self.at = [I64(lanes * v) for v in range(vectors - 1)] + [self.arg["last"]]

    def emit(self) -> None:
        """Bias, one of two sums, and one of three ends: a clamp with or without residual, or another activation."""
        b = self.b
        bias = [self.splat(self.load(self.arg["bias"], I64(m), F32)) for m in range(self.filters)]
        sums = self._either_sum([[each] * self.vectors for each in bias])
        plain, added, general = (b.append_basic_block(name) for name in ("plain", "added", "general"))
        clamped = b.append_basic_block("clamped")
        b.cbranch(b.icmp_signed("==", self.arg["code"], I64(0)), clamped, general)
        b.position_at_end(clamped)
        b.cbranch(self.is_given("residual"), added, plain)
        for block, residual in ((plain, False), (added, True)):
            b.position_at_end(block)
            self._store_clamped(sums, residual)
            b.ret_void()
        b.position_at_end(general)
        self._store_activated(sums)
        b.ret_void()

    def _either_sum(self, start: list[list[Any]]) -> list[list[Any]]:
        """The sum over inputs as they are, or kept between their ends."""
        b = self.b
        plain, bounded, after = (b.append_basic_block(name) for name in ("unbounded", "bounded", "summed"))
        b.cbranch(self.is_given("ends"), bounded, plain)
        arms = []
        for block, keep_between in ((plain, False), (bounded, True)):
            b.position_at_end(block)
            sums = self._sum(start, keep_between)
            arms.append((b.block, sums))
            b.branch(after)
        b.position_at_end(after)
        total = self._phis()
        for block, sums in arms:
            join(_flat(total), block, _flat(sums))
        return total

    def _sum(self, start: list[list[Any]], keep_between: bool) -> list[list[Any]]:
        """Sum over inputs (outer loop) and taps (inner loop), from `start`; a layer without inputs skips both."""
        b, arg = self.b, self.arg
        before = b.block
        outer, inner, latch, done = (b.append_basic_block(name) for name in ("inputs", "taps", "latch", "done"))
        b.cbranch(b.icmp_signed(">", arg["input_count"], I64(0)), outer, done)

        b.position_at_end(outer)
        k, row_weight, sums = b.phi(I64), b.phi(POINTER), self._phis()
        channel = self.load(arg["inputs"], k, I64)
        row = self.address(arg["x"], b.mul(channel, arg["channel_stride"]), F32)
        ends = None
        if keep_between:
            at = b.mul(channel, I64(2))
            ends = [self.splat(self.load(arg["ends"], b.add(at, I64(end)), F32)) for end in (0, 1)]
        b.branch(inner)

        b.position_at_end(inner)
        t, weight, partial = b.phi(I64), b.phi(POINTER), self._phis()
        new = self._multiply(self.address(row, self.load(arg["taps"], t, I64), F32), weight, partial, ends)
        next_weight = self.address(weight, I64(self.filters), F32)
        next_t = b.add(t, I64(1))
        b.cbranch(b.icmp_signed("<", next_t, arg["tap_count"]), inner, latch)

        b.position_at_end(latch)
        next_k = b.add(k, I64(1))
        b.cbranch(b.icmp_signed("<", next_k, arg["input_count"]), outer, done)

        b.position_at_end(done)
        total = self._phis()
        join([k, row_weight, *_flat(sums)], before, [I64(0), arg["weight"], *_flat(start)])
        join([k, row_weight, *_flat(sums)], latch, [next_k, next_weight, *_flat(new)])
        join([t, weight, *_flat(partial)], outer, [I64(0), row_weight, *_flat(sums)])
        join([t, weight, *_flat(partial)], inner, [next_t, next_weight, *_flat(new)])
        join(_flat(total), before, _flat(start))
        join(_flat(total), latch, _flat(new))
        return total

    def _multiply(self, row: Any, weight: Any, sums: list[list[Any]], ends: list[Any] | None) -> list[list[Any]]:
        """Add the products of one input row with the weights of all filters."""
        to_read, soon, data = I32(0), I32(3), I32(1)
        self.b.call(self.prefetch, [self.address(weight, I64(_AHEAD), F32), to_read, soon, data])
        pixels = [self.load(row, at, self.vector) for at in self.at]
        if ends is not None:
            pixels = [activations.clamp(self.b, x, *ends) for x in pixels]
        new = []
        for m in range(self.filters):
            factor = self.splat(self.load(weight, I64(m), F32))
            new.append([self.fma(factor, x, y) for x, y in zip(pixels, sums[m], strict=True)])
        return new

    def _store_clamped(self, sums: list[list[Any]], residual: bool) -> None:
        low, high = self.splat(self.arg["low"]), self.splat(self.arg["high"])
        for m in range(self.filters):
            out, more = self._row("out", I64(m)), self._row("residual", I64(m)) if residual else None
            for at, total in zip(self.at, sums[m], strict=True):
                value = self.b.fadd(total, self.load(more, at, self.vector)) if residual else total
                self.store(activations.clamp(self.b, value, low, high), out, at)

    def _store_activated(self, sums: list[list[Any]]) -> None:
        """Store through a buffer and a rolled loop: unrolled, long formulas would dominate the code's size."""
        b, count = self.b, self.filters * self.vectors
        with b.goto_entry_block():
            buffer = b.alloca(self.vector, size=I64(count), name="sums")
            offsets = b.alloca(I64, size=I64(self.vectors), name="at")
        for index, value in enumerate(_flat(sums)):
            self.store(value, buffer, I64(index * self.lanes))
        for index, at in enumerate(self.at):
            b.store(at, self.address(offsets, I64(index), I64))
        with self.loop(I64(0), I64(self.filters)) as row, self.loop(I64(0), I64(self.vectors)) as column:
            m, at = row.index, self.load(offsets, column.index, I64)
            index = b.add(b.mul(m, I64(self.vectors)), column.index)
            value = self.load(buffer, b.mul(index, I64(self.lanes)), self.vector)
            value = self._plus_residual(value, m, at)
            value = activations.emit(self, value, self.arg["code"])
            self.store(value, self._row("out", m), at)

    def _plus_residual(self, value: Any, m: Any, at: Any) -> Any:
        b = self.b
        before, added, after = b.block, b.append_basic_block("add"), b.append_basic_block("after")
        b.cbranch(self.is_given("residual"), added, after)
        b.position_at_end(added)
        total = b.fadd(value, self.load(self._row("residual", m), at, self.vector))
        b.branch(after)
        b.position_at_end(after)
        result = b.phi(self.vector)
        join([result], before, [value])
        join([result], added, [total])
        return result

    def _row(self, name: str, m: Any) -> Any:
        """Address of the m-th filter's row in ``out`` or ``residual``."""
        row = self.load(self.arg["rows"], m, I64)
        return self.address(self.arg[name], self.b.mul(row, self.arg[f"{name}_stride"]), F32)

    def _phis(self) -> list[list[Any]]:
        return [[self.b.phi(self.vector) for _ in range(self.vectors)] for _ in range(self.filters)]


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]
