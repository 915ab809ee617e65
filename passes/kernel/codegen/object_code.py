"""Compiled kernels: emitted and compiled once per machine, kept on disk as an object file, loaded per process."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from passes.kernel.codegen import cache
from passes.kernel.codegen.target import MOST_FILTERS, Target

TABLE_WIDTH = 16  # entries per filter count in the table of addresses

PLANE_KERNELS = ("sgfx_pointwise", "sgfx_mean", "sgfx_pixel")

_libraries: dict[Target, Library] = {}
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Library:
    """The kernels of one target.

    Attributes:
        target: what they were compiled for.
        addresses: int64 ``[(MOST_FILTERS + 1) · TABLE_WIDTH]``: entry ``filters · TABLE_WIDTH + vectors`` is the
            address of that micro-kernel; entry ``filters · TABLE_WIDTH`` is the largest number of vectors. The first
            ones are those of `PLANE_KERNELS`.
        engine: keeps the code alive.
    """

    target: Target
    addresses: ctypes.Array[ctypes.c_int64]
    engine: Any

    def address(self, name: str) -> int:
        """Address of a kernel."""
        found: int = self.engine.get_function_address(name)
        return found


def library(target: Target) -> Library:
    """Load the kernels of `target`; the first time on a machine this compiles them (a few seconds)."""
    with _lock:
        if target not in _libraries:
            _libraries[target] = _load(target)
        return _libraries[target]


def _load(target: Target) -> Library:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, jit=True
    )
    identity = repr((target, llvm.llvm_version_info, machine.triple))
    name = f"{target.cpu}-{target.lanes}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.o"
    code = cache.load(name)
    if code is None:
        code = _compile(target, machine)
        cache.store(name, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Library(target, _table(target, engine), engine)


def _compile(target: Target, machine: Any) -> bytes:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(module_ir(target))
    module.verify()
    code: bytes = machine.emit_object(module)
    return code


def module_ir(target: Target) -> str:
    """LLVM IR of every kernel of a target, as text."""
    from llvmlite import ir

    from passes.kernel.codegen.micro_kernel import emit_micro_kernels
    from passes.kernel.codegen.plane_kernels import emit_plane_kernels
    from passes.kernel.codegen.window_kernel import emit_window_kernels

    module = ir.Module("sgfx")
    emit_micro_kernels(module, target)
    emit_plane_kernels(module, target.lanes)
    emit_window_kernels(module, target.lanes)
    return str(module)


def _table(target: Target, engine: Any) -> ctypes.Array[ctypes.c_int64]:
    from passes.kernel.codegen.micro_kernel import symbol

    table = (ctypes.c_int64 * ((MOST_FILTERS + 1) * TABLE_WIDTH))()
    for number, name in enumerate(PLANE_KERNELS):
        table[number] = engine.get_function_address(name)
    for filters in range(1, MOST_FILTERS + 1):
        table[filters * TABLE_WIDTH] = target.most_vectors(filters)
        for vectors in range(1, target.most_vectors(filters) + 1):
            address = engine.get_function_address(symbol(filters, vectors))
            table[filters * TABLE_WIDTH + vectors] = address
    return table
