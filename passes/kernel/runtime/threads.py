"""Running a compiled function on torch's own threads.

torch is linked to an OpenMP runtime. Its entry point, ``GOMP_parallel(function, data, threads, flags)``, is found
through torch's library, so the kernel uses the very pool of threads that torch's own operations use. A second pool,
such as numba would open, would spin on the cores that the first one needs. The runtime may be entered by several Python
threads at once: each has a team of its own.

A forked child inherits a pool without its threads and would wait for them forever; there, and where torch has no
OpenMP, the calling thread does all the work.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603  (a process is forked or not; there is nothing else to hang it on)
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available() -> int:
    """Threads a call may use: torch's number, or 1 where a team can't be formed."""
    return 1 if _forked or _parallel() is None else torch.get_num_threads()


def run(function: Callable[[int], None], address: int, call: int, threads: int) -> None:
    """Run a compiled function on `threads` threads at once, all on the calls at address `call`.

    Args:
        function: the compiled function, callable from Python.
        address: of the same function.
        call: address of the first `Call`.
        threads: at most `available()`.
    """
    parallel = _parallel()
    if threads == 1 or parallel is None:
        function(call)
    else:
        parallel(address, call, threads, 0)


@cache
def barrier() -> int:
    """Address of the OpenMP runtime's function in which the threads of a team wait for each other; 0 without OpenMP."""
    runtime = _runtime()
    return 0 if runtime is None else ctypes.cast(runtime.GOMP_barrier, ctypes.c_void_p).value or 0


@cache
def _parallel() -> Any | None:
    """The OpenMP runtime's entry point, or None if torch has none."""
    runtime = _runtime()
    if runtime is None:
        return None
    entry = runtime.GOMP_parallel
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


@cache
def _runtime() -> ctypes.CDLL | None:
    """torch's library, through which its OpenMP runtime is found, or None if it has none."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    prefix = "" if sys.platform == "win32" else "lib"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"{prefix}torch_cpu.{suffix}"))
        found = torch_cpu.GOMP_parallel and torch_cpu.GOMP_barrier
    except (OSError, AttributeError):
        return None
    return torch_cpu if found else None
