"""Which vectors the machine has, and how a micro-kernel divides its registers among filters and pixels.

A micro-kernel holds `filters` × `vectors` accumulators, the pixel vectors of one input row and one broadcast weight. So
``filters · vectors + vectors + 1`` registers must do; more than three quarters of them as accumulators, or more than
twelve vectors, gain nothing.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

MOST_FILTERS = 8
_MOST_VECTORS = 12


@dataclass(frozen=True)
class Target:
    """A processor as the micro-kernels see it.

    Attributes:
        lanes: fp32 numbers in a vector.
        registers: vector registers.
        cpu: LLVM's name of the processor.
        features: LLVM's feature string.
    """

    lanes: int
    registers: int
    cpu: str
    features: str

    def most_vectors(self, filters: int) -> int:
        """Vectors of pixels that fit the registers beside `filters` filters, at least 1."""
        fitting = min((self.registers - 1) // (filters + 1), 3 * self.registers // 4 // filters, _MOST_VECTORS)
        return max(fitting, 1)

    @property
    def most_filters(self) -> int:
        """Filters of the largest micro-kernel that is worth packing for; all machines have those of `MOST_FILTERS`."""
        return MOST_FILTERS if self.registers >= 32 else 6


@cache
def host() -> Target | str:
    """The machine's target, or the reason why the kernel can't run here."""
    try:
        import llvmlite.binding as llvm
        import numba  # noqa: F401  (the driver needs it; say so here rather than at the first call)
    except ImportError as error:
        return f"numba can't be imported ({error})"
    features = dict(llvm.get_host_cpu_features())
    cpu, flags = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    if features.get("avx512f"):
        return Target(16, 32, cpu, flags)
    if features.get("avx2") and features.get("fma"):
        return Target(8, 16, cpu, flags)
    if platform.machine().lower() in ("arm64", "aarch64"):
        return Target(4, 32, cpu, flags)
    return f"the kernel knows no vectors for a {platform.machine()} processor ({cpu}): it needs AVX-512, AVX2 or NEON"


def supported() -> str | None:
    """Why the kernel can't run on this machine (numba missing, unknown processor), or None if it can."""
    found = host()
    return found if isinstance(found, str) else None
