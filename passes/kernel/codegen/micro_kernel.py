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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from passes.kernel.codegen import activations
from passes.kernel.codegen.target import MOST_FILTERS, Target

# Weights are read once from end to end. What lies this far ahead is asked for: the processor does so by itself, but not
# beyond the page it is in; a twentieth of ResNet-50's time.
_AHEAD = 2048 // 4
_F32, _I32, _I64, _POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()

# The arguments of a micro-kernel, in order. `residual` may be null; strides and offsets count numbers, not bytes.
ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("x", _POINTER),
    ("inputs", _POINTER),  # int64 [input_count]
    ("input_count", _I64),  # may be 0: then the sum is the bias
    ("channel_stride", _I64),
    ("ends", _POINTER),  # float [in_channels, 2]; may be null
    ("taps", _POINTER),  # int64 [tap_count]
    ("tap_count", _I64),  # at least 1
    ("weight", _POINTER),  # float [input_count, tap_count, filters]
    ("bias", _POINTER),  # float [filters]
    ("out", _POINTER),
    ("rows", _POINTER),  # int64 [filters]
    ("out_stride", _I64),
    ("residual", _POINTER),
    ("residual_stride", _I64),
    ("last", _I64),
    ("code", _I64),  # of the activation
    ("low", _F32),
    ("high", _F32),
)
SIGNATURE = ir.FunctionType(ir.VoidType(), [kind for _, kind in ARGUMENTS])


def symbol(filters: int, vectors: int) -> str:
    """Name of a micro-kernel in its object file."""
    return f"sgfx_{filters}x{vectors}"


def module_ir(target: Target) -> str:
    """LLVM IR of every micro-kernel of a target, as text."""
    module = ir.Module("sgfx")
    for filters in range(1, MOST_FILTERS + 1):
        for vectors in range(1, target.most_vectors(filters) + 1):
            _MicroKernel(module, target.lanes, filters, vectors).emit()
    return str(module)


class _MicroKernel:
    """Emits one micro-kernel into `module`."""

    def __init__(self, module: ir.Module, lanes: int, filters: int, vectors: int) -> None:
        self.filters, self.vectors, self.lanes = filters, vectors, lanes
        self.vector = ir.VectorType(_F32, lanes)
        function = ir.Function(module, SIGNATURE, symbol(filters, vectors))
        self.fma = module.globals.get(f"llvm.fma.v{lanes}f32") or ir.Function(
            module, ir.FunctionType(self.vector, [self.vector] * 3), f"llvm.fma.v{lanes}f32"
        )
        kinds = [_POINTER, _I32, _I32, _I32]
        self.prefetch = module.globals.get("llvm.prefetch.p0") or ir.Function(
            module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.arg = {name: value for (name, _), value in zip(ARGUMENTS, function.args, strict=True)}
        self.at = [_I64(lanes * v) for v in range(vectors - 1)] + [self.arg["last"]]

    def emit(self) -> None:
        """Bias, one of two sums, and one of three ends: a clamp with or without residual, or another activation."""
        b = self.b
        bias = [self._splat(self._load(self.arg["bias"], _I64(m), _F32)) for m in range(self.filters)]
        sums = self._either_sum([[each] * self.vectors for each in bias])
        plain, added, general = (b.append_basic_block(name) for name in ("plain", "added", "general"))
        clamped = b.append_basic_block("clamped")
        b.cbranch(b.icmp_signed("==", self.arg["code"], _I64(0)), clamped, general)
        b.position_at_end(clamped)
        b.cbranch(self._is_given("residual"), added, plain)
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
        b.cbranch(self._is_given("ends"), bounded, plain)
        arms = []
        for block, keep_between in ((plain, False), (bounded, True)):
            b.position_at_end(block)
            sums = self._sum(start, keep_between)
            arms.append((b.block, sums))
            b.branch(after)
        b.position_at_end(after)
        total = self._phis()
        for block, sums in arms:
            _join(_flat(total), block, _flat(sums))
        return total

    def _sum(self, start: list[list[Any]], keep_between: bool) -> list[list[Any]]:
        """Sum over inputs (outer loop) and taps (inner loop), from `start`; a layer without inputs skips both."""
        b, arg = self.b, self.arg
        before = b.block
        outer, inner, latch, done = (b.append_basic_block(name) for name in ("inputs", "taps", "latch", "done"))
        b.cbranch(b.icmp_signed(">", arg["input_count"], _I64(0)), outer, done)

        b.position_at_end(outer)
        k, row_weight, sums = b.phi(_I64), b.phi(_POINTER), self._phis()
        channel = self._load(arg["inputs"], k, _I64)
        row = self._address(arg["x"], b.mul(channel, arg["channel_stride"]), _F32)
        ends = None
        if keep_between:
            at = b.mul(channel, _I64(2))
            ends = [self._splat(self._load(arg["ends"], b.add(at, _I64(end)), _F32)) for end in (0, 1)]
        b.branch(inner)

        b.position_at_end(inner)
        t, weight, partial = b.phi(_I64), b.phi(_POINTER), self._phis()
        new = self._multiply(self._address(row, self._load(arg["taps"], t, _I64), _F32), weight, partial, ends)
        next_weight = self._address(weight, _I64(self.filters), _F32)
        next_t = b.add(t, _I64(1))
        b.cbranch(b.icmp_signed("<", next_t, arg["tap_count"]), inner, latch)

        b.position_at_end(latch)
        next_k = b.add(k, _I64(1))
        b.cbranch(b.icmp_signed("<", next_k, arg["input_count"]), outer, done)

        b.position_at_end(done)
        total = self._phis()
        _join([k, row_weight, *_flat(sums)], before, [_I64(0), arg["weight"], *_flat(start)])
        _join([k, row_weight, *_flat(sums)], latch, [next_k, next_weight, *_flat(new)])
        _join([t, weight, *_flat(partial)], outer, [_I64(0), row_weight, *_flat(sums)])
        _join([t, weight, *_flat(partial)], inner, [next_t, next_weight, *_flat(new)])
        _join(_flat(total), before, _flat(start))
        _join(_flat(total), latch, _flat(new))
        return total

    def _multiply(self, row: Any, weight: Any, sums: list[list[Any]], ends: list[Any] | None) -> list[list[Any]]:
        """Add the products of one input row with the weights of all filters."""
        to_read, soon, data = _I32(0), _I32(3), _I32(1)
        self.b.call(self.prefetch, [self._address(weight, _I64(_AHEAD), _F32), to_read, soon, data])
        pixels = [self._load(row, at, self.vector) for at in self.at]
        if ends is not None:
            pixels = [activations.clamp(self.b, x, *ends) for x in pixels]
        new = []
        for m in range(self.filters):
            factor = self._splat(self._load(weight, _I64(m), _F32))
            new.append([self.b.call(self.fma, [factor, x, y]) for x, y in zip(pixels, sums[m], strict=True)])
        return new

    def _store_clamped(self, sums: list[list[Any]], residual: bool) -> None:
        low, high = self._splat(self.arg["low"]), self._splat(self.arg["high"])
        for m in range(self.filters):
            out, more = self._row("out", _I64(m)), self._row("residual", _I64(m)) if residual else None
            for at, total in zip(self.at, sums[m], strict=True):
                value = self.b.fadd(total, self._load(more, at, self.vector)) if residual else total
                self._store(activations.clamp(self.b, value, low, high), out, at)

    def _store_activated(self, sums: list[list[Any]]) -> None:
        """Store through a buffer and a rolled loop: unrolled, long formulas would dominate the code's size."""
        b, count = self.b, self.filters * self.vectors
        with b.goto_entry_block():
            buffer = b.alloca(self.vector, size=_I64(count), name="sums")
            offsets = b.alloca(_I64, size=_I64(self.vectors), name="at")
        for index, value in enumerate(_flat(sums)):
            self._store(value, buffer, _I64(index * self.lanes))
        for index, at in enumerate(self.at):
            b.store(at, self._address(offsets, _I64(index), _I64))
        with self._loop(count) as index:
            m, v = b.sdiv(index, _I64(self.vectors)), b.srem(index, _I64(self.vectors))
            at = self._load(offsets, v, _I64)
            value = self._load(buffer, b.mul(index, _I64(self.lanes)), self.vector)
            value = self._plus_residual(value, m, at)
            value = activations.emit(b, value, self.arg["code"], lambda x: self.vector([x] * self.lanes))
            self._store(value, self._row("out", m), at)

    def _plus_residual(self, value: Any, m: Any, at: Any) -> Any:
        b = self.b
        before, added, after = b.block, b.append_basic_block("add"), b.append_basic_block("after")
        b.cbranch(self._is_given("residual"), added, after)
        b.position_at_end(added)
        total = b.fadd(value, self._load(self._row("residual", m), at, self.vector))
        b.branch(after)
        b.position_at_end(after)
        result = b.phi(self.vector)
        _join([result], before, [value])
        _join([result], added, [total])
        return result

    @contextmanager
    def _loop(self, count: int) -> Iterator[Any]:
        """Emit what the ``with`` body emits as the body of a loop over ``range(count)``."""
        b = self.b
        before, body, after = b.block, b.append_basic_block("loop"), b.append_basic_block("end")
        b.branch(body)
        b.position_at_end(body)
        index = b.phi(_I64)
        yield index
        following = b.add(index, _I64(1))
        _join([index], before, [_I64(0)])
        _join([index], b.block, [following])
        b.cbranch(b.icmp_signed("<", following, _I64(count)), body, after)
        b.position_at_end(after)

    def _is_given(self, name: str) -> Any:
        return self.b.icmp_unsigned("!=", self.b.ptrtoint(self.arg[name], _I64), _I64(0))

    def _row(self, name: str, m: Any) -> Any:
        """Address of the m-th filter's row in ``out`` or ``residual``."""
        row = self._load(self.arg["rows"], m, _I64)
        return self._address(self.arg[name], self.b.mul(row, self.arg[f"{name}_stride"]), _F32)

    def _phis(self) -> list[list[Any]]:
        return [[self.b.phi(self.vector) for _ in range(self.vectors)] for _ in range(self.filters)]

    def _address(self, base: Any, index: Any, kind: Any) -> Any:
        return self.b.gep(base, [index], source_etype=kind)

    def _load(self, base: Any, index: Any, kind: Any) -> Any:
        """Load a `kind` at an offset; vectors lie at offsets in numbers, and need not be aligned."""
        element = _F32 if kind == self.vector else kind
        return self.b.load(self._address(base, index, element), align=8 if element == _I64 else 4, typ=kind)

    def _store(self, vector: Any, base: Any, index: Any) -> None:
        self.b.store(vector, self._address(base, index, _F32), align=4)

    def _splat(self, number: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.b.insert_element(undefined, number, _I32(0))
        return self.b.shuffle_vector(first, undefined, ir.VectorType(_I32, self.lanes)([0] * self.lanes))


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _join(phis: list[Any], block: Any, values: list[Any]) -> None:
    """Give each phi its value where control comes from `block`."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)
