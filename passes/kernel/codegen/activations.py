"""Activations that a micro-kernel applies to its accumulators before it stores them.

Two kinds. A *clamp* to ``[low, high]`` costs two instructions, so every micro-kernel always does it; the identity and
the ReLUs are clamps. The others have a code and are emitted here, once per micro-kernel, in a rolled loop. To add one,
give it a name and a code in `ACTIVATIONS` and its formula in `emit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from passes.errors import InputError

_CLAMP, _HARDSWISH, _SILU = range(3)


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


def emit(builder: Any, x: Any, code: Any, splat: Any) -> Any:
    """Apply the activation with run-time `code` > 0 to vector `x`; `splat(number)` makes a constant vector."""
    is_silu = builder.icmp_signed("==", code, code.type(_SILU))
    # Both are computed and one is chosen: a branch per vector would cost as much as the shorter formula.
    return builder.select(is_silu, _silu(builder, x, splat), _hardswish(builder, x, splat))


def _hardswish(builder: Any, x: Any, splat: Any) -> Any:
    gate = clamp(builder, builder.fadd(x, splat(3.0)), splat(0.0), splat(6.0))
    return builder.fmul(builder.fmul(x, gate), splat(1 / 6))


def _silu(builder: Any, x: Any, splat: Any) -> Any:
    """``x / (1 + exp(−x))``."""
    return builder.fdiv(x, builder.fadd(splat(1.0), _exp(builder, builder.fneg(x), splat)))


def _exp(builder: Any, x: Any, splat: Any) -> Any:
    """``exp(x) = 2^n · exp(r)`` with ``|r| ≤ ln 2 / 2``, and the Taylor series of ``exp(r)`` up to r⁷: fp32 accuracy.

    Adding 1.5·2²³ rounds to an integer that can then be read from the low bits, without a conversion that would be
    undefined for NaN. ``ln 2`` is split in two, so that ``x − n·ln 2`` is exact in its leading bits.
    """
    from llvmlite import ir

    integers = ir.VectorType(ir.IntType(32), x.type.count)
    magic = splat(1.5 * 2**23)
    x = clamp(builder, x, splat(-87.0), splat(88.0))
    shifted = builder.fadd(builder.fmul(x, splat(1 / math.log(2))), magic)
    n = builder.fsub(shifted, magic)
    high = math.ldexp(round(math.ldexp(math.log(2), 15)), -15)
    r = builder.fsub(x, builder.fmul(n, splat(high)))
    r = builder.fsub(r, builder.fmul(n, splat(math.log(2) - high)))
    series = splat(1 / math.factorial(7))
    for power in range(6, -1, -1):
        series = builder.fadd(builder.fmul(series, r), splat(1 / math.factorial(power)))
    exponent = builder.shl(builder.bitcast(shifted, integers), integers([23] * x.type.count))
    return builder.bitcast(builder.add(builder.bitcast(series, integers), exponent), x.type)
