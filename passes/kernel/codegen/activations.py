"""Activations that a micro-kernel applies to its accumulators before it stores them.

Two kinds. A *clamp* to ``[low, high]`` costs two instructions, so every micro-kernel always does it; the identity and
the ReLUs are clamps. The others have a code and are emitted here, once per micro-kernel, in a rolled loop. To add one,
give it a name and a code in `ACTIVATIONS` and its formula in `emit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.errors import InputError

if TYPE_CHECKING:
    from passes.kernel.codegen.emitter import Emitter

_CLAMP, _HARDSWISH, _SILU, _HARDSIGMOID, _SIGMOID = range(5)


@dataclass(frozen=True)
class Activation:
    """What is done to a sum: clamp it to ``[low, high]`` (code 0), or what `emit` does for the code."""

    code: int = _CLAMP
    low: float = -math.inf
    high: float = math.inf


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(),
    "relu": Activation(low=0.0),
    "relu6": Activation(low=0.0, high=6.0),
    "hardswish": Activation(_HARDSWISH),
    "silu": Activation(_SILU),
    "hardsigmoid": Activation(_HARDSIGMOID),
    "sigmoid": Activation(_SIGMOID),
}


def activation(name: str | None) -> Activation:
    """Look an activation up by its name; None is the identity."""
    if name not in ACTIVATIONS:
        known = ", ".join(repr(each) for each in ACTIVATIONS)
        raise InputError(f"activation={name!r} is not one the kernel can fuse; it knows {known}")
    return ACTIVATIONS[name]


def clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    """Clamp vector `x`; NaN stays NaN, as it does in torch: hence comparisons that NaN fails."""
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def emit(e: Emitter, x: Any, code: Any) -> Any:
    """Apply the activation with run-time `code` > 0 to vector `x`.

    All four are a numerator, x or 1, times a gate, soft or hard: both gates are computed and one is chosen, since a
    branch per vector would cost as much as the shorter formula.
    """
    b = e.b
    is_gate = b.icmp_signed(">=", code, code.type(_HARDSIGMOID))
    is_soft = b.or_(*(b.icmp_signed("==", code, code.type(each)) for each in (_SILU, _SIGMOID)))
    numerator = b.select(is_gate, e.constant(1.0), x)
    hard = clamp(b, b.fadd(x, e.constant(3.0)), e.constant(0.0), e.constant(6.0))
    hard = b.fmul(b.fmul(numerator, hard), e.constant(1 / 6))
    soft = b.fdiv(numerator, b.fadd(e.constant(1.0), _exp(e, b.fneg(x))))
    return b.select(is_soft, soft, hard)


def _exp(e: Emitter, x: Any) -> Any:
    """``exp(x) = 2^n · exp(r)`` with ``|r| ≤ ln 2 / 2``, and the Taylor series of ``exp(r)`` up to r⁷: fp32 accuracy.

    Adding 1.5·2²³ rounds to an integer that can then be read from the low bits, without a conversion that would be
    undefined for NaN. ``ln 2`` is split in two, so that ``x − n·ln 2`` is exact in its leading bits.
    """
    from llvmlite import ir

    b, integers = e.b, ir.VectorType(ir.IntType(32), x.type.count)
    magic = e.constant(1.5 * 2**23)
    x = clamp(b, x, e.constant(-87.0), e.constant(88.0))
    shifted = e.fma(x, e.constant(1 / math.log(2)), magic)
    n = b.fsub(shifted, magic)
    high = math.ldexp(round(math.ldexp(math.log(2), 15)), -15)
    r = e.fma(n, e.constant(-high), x)
    r = e.fma(n, e.constant(high - math.log(2)), r)
    series = e.constant(1 / math.factorial(7))
    for power in range(6, -1, -1):
        series = e.fma(series, r, e.constant(1 / math.factorial(power)))
    exponent = b.shl(b.bitcast(shifted, integers), integers([23] * x.type.count))
    return b.bitcast(b.add(b.bitcast(series, integers), exponent), x.type)
