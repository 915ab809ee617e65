"""What all emitted functions are made of: arguments by name, loads and stores of vectors, loops, masks.

Every address is a pointer, every offset and stride a number of elements. Vectors need not be aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

F32, I32, I64, POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()
Arguments = Sequence[tuple[str, Any]]


class Emitter:
    """Emits one function into `module`.

    Attributes:
        b: the builder, at the end of what was emitted.
        arg: the function's arguments.
        lanes: numbers of a vector.
        vector: its type.
    """

    def __init__(self, module: ir.Module, lanes: int, name: str, arguments: Arguments) -> None:
        """Begin the function."""
        self.module, self.lanes, self.vector = module, lanes, ir.VectorType(F32, lanes)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind for _, kind in arguments]), name)
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.arg = {name: value for (name, _), value in zip(arguments, function.args, strict=True)}

    def intrinsic(self, name: str, result: Any, kinds: Sequence[Any]) -> Any:
        """One of LLVM's own functions."""
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, kinds), name)

    def fma(self, factor: Any, x: Any, y: Any) -> Any:
        """``factor · x + y``, rounded once."""
        function = self.intrinsic(f"llvm.fma.v{self.lanes}f32", self.vector, [self.vector] * 3)
        return self.b.call(function, [factor, x, y])

    @contextmanager
    def loop(self, start: Any, end: Any, step: int = 1, carried: Sequence[Any] = ()) -> Iterator[Any]:
        """Emit what the ``with`` body emits as the body of a loop over ``range(start, end, step)``.

        Gives an object with the ``index``, and ``values``: what is `carried` from turn to turn. The body puts the next
        ones there; behind the loop they are the last ones.
        """
        b = self.b
        before, head, body, after = b.block, *(b.append_basic_block(name) for name in ("head", "loop", "end"))
        b.branch(head)
        b.position_at_end(head)
        turn = _Turn(b.phi(I64), [b.phi(each.type) for each in carried])
        phis = list(turn.values)
        b.cbranch(b.icmp_signed("<", turn.index, end), body, after)
        b.position_at_end(body)
        yield turn
        join([turn.index, *phis], before, [start, *carried])
        join([turn.index, *phis], b.block, [b.add(turn.index, I64(step)), *turn.values])
        b.branch(head)
        b.position_at_end(after)
        turn.values = phis

    def is_given(self, name: str) -> Any:
        """Whether an address is not null."""
        return self.b.icmp_unsigned("!=", self.b.ptrtoint(self.arg[name], I64), I64(0))

    def address(self, base: Any, index: Any, kind: Any = F32) -> Any:
        """Address of the element at an index."""
        return self.b.gep(base, [index], source_etype=kind)

    def load(self, base: Any, index: Any, kind: Any) -> Any:
        """Load a `kind` at an offset in elements."""
        element = F32 if kind == self.vector else kind
        return self.b.load(self.address(base, index, element), align=8 if element == I64 else 4, typ=kind)

    def store(self, vector: Any, base: Any, index: Any) -> None:
        """Store a vector at an offset in numbers."""
        self.b.store(vector, self.address(base, index), align=4)

    def splat(self, number: Any) -> Any:
        """The vector of one number."""
        kind = ir.VectorType(number.type, self.lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(undefined, number, I32(0))
        return self.b.shuffle_vector(first, undefined, ir.VectorType(I32, self.lanes)([0] * self.lanes))

    def constant(self, number: float) -> Any:
        """The vector of one constant."""
        return self.vector([number] * self.lanes)

    def lanes_below(self, first: Any, end: Any) -> Any:
        """Which lanes have an index in ``0 … end``, the first of them having index `first`: the mask of a rest."""
        b, kind = self.b, ir.VectorType(I32, self.lanes)
        index = b.add(self.splat(b.trunc(first, I32)), kind(list(range(self.lanes))))
        return b.icmp_unsigned("<", index, self.splat(b.trunc(end, I32)))

    def load_where(self, mask: Any, base: Any, index: Any, otherwise: Any) -> Any:
        """Load the lanes of a mask; nothing is read elsewhere."""
        kinds = [POINTER, I32, mask.type, self.vector]
        function = self.intrinsic(f"llvm.masked.load.v{self.lanes}f32.p0", self.vector, kinds)
        return self.b.call(function, [self.address(base, index), I32(4), mask, otherwise])

    def store_where(self, mask: Any, vector: Any, base: Any, index: Any) -> None:
        """Store the lanes of a mask; nothing is written elsewhere."""
        kinds = [self.vector, POINTER, I32, mask.type]
        function = self.intrinsic(f"llvm.masked.store.v{self.lanes}f32.p0", ir.VoidType(), kinds)
        self.b.call(function, [vector, self.address(base, index), I32(4), mask])


class _Turn:
    """One turn of a loop."""

    def __init__(self, index: Any, values: list[Any]) -> None:
        self.index, self.values = index, values


def join(phis: Sequence[Any], block: Any, values: Sequence[Any]) -> None:
    """Give each phi its value where control comes from `block`."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)
