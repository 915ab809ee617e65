"""Dynamic shapes of exported programs: what example inputs to export from, and at which other sizes to compare.

Sizes are enlarged by repeating what is there. Which dimensions vary is read off the exported program: its symbols, with
the ranges that torch.export gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from passes.models import mapped, tensors_in

Inputs: TypeAlias = tuple[Any, ...]
Sizes: TypeAlias = list[list[Any]]  # of each input tensor: numbers, or expressions of symbols


def without_names(dynamic_shapes: Any) -> Any:
    """Dynamic shapes in the words of torch.export: a name, as torch.onnx takes it, is a dimension that varies."""
    return pytree.tree_map(lambda dim: Dim.DYNAMIC if isinstance(dim, str) else dim, dynamic_shapes)


def widened(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Inputs:
    """Inputs with two entries along each dynamic dimension that has one: exporting would take 1 for a constant."""
    try:
        arguments = inspect.signature(model.forward).bind(*inputs).arguments
    except (TypeError, ValueError):  # the call itself will say it
        return inputs
    shapes = (
        dynamic_shapes if isinstance(dynamic_shapes, Mapping) else dict(zip(arguments, dynamic_shapes, strict=False))
    )
    found = {id(x): axes for name, value in arguments.items() for x, axes in _axes(value, shapes.get(name))}
    return mapped(
        inputs, lambda x: _sized(x, [2 if d in found.get(id(x), ()) and n == 1 else n for d, n in enumerate(x.shape)])
    )


def _axes(value: Any, shapes: Any) -> Iterator[tuple[Tensor, list[int]]]:
    """The tensors in a value, each with the dimensions that `shapes` lets vary."""
    if isinstance(value, Tensor):
        items = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        yield value, [axis % value.dim() for axis, dim in items if dim is not None and not isinstance(dim, int)]
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key, item in value.items():
            yield from _axes(item, shapes.get(key))
    elif isinstance(value, tuple | list) and isinstance(shapes, tuple | list):
        for item, each in zip(value, shapes, strict=False):
            yield from _axes(item, each)


def sizes_of(program: ExportedProgram) -> Sizes:
    """The sizes of a program's input tensors."""
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [nodes.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    return [[_size(size) for size in tensor.shape] for tensor in tensors if isinstance(tensor, Tensor)]


def _size(size: Any) -> Any:
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return expression if getattr(expression, "free_symbols", None) else int(expression)


def other_inputs(program: ExportedProgram, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Inputs of other sizes that the program may take, and whether they are "smaller" or "larger" than `inputs`."""
    sizes = sizes_of(program)
    now = _values(sizes, tensors_in(inputs))
    inner = {symbol for each in sizes for size in each[1:] if not isinstance(size, int) for symbol in size.free_symbols}
    one = {symbol: value - 1 if symbol in inner else 1 for symbol, value in now.items()}  # a batch of one
    wanted = [
        ("smaller", one),
        ("smaller", {symbol: value - 1 for symbol, value in now.items()}),
        *(("larger", {symbol: value + more for symbol, value in now.items()}) for more in (1, 2, 4)),
        ("larger", {symbol: 2 * value for symbol, value in now.items()}),
    ]
    for kind, near in wanted:
        values = {symbol: _within(program, symbol, value) for symbol, value in near.items()}
        if values != now:
            yield kind, _resized(inputs, sizes, values)


def _resized(inputs: Inputs, sizes: Sizes, values: dict[Any, int]) -> Inputs:
    """Inputs of the sizes that a program has with these values of its symbols."""
    each = iter(sizes)
    return mapped(
        inputs,
        lambda x: _sized(x, [size if isinstance(size, int) else int(size.subs(values)) for size in next(each)]),
    )


def _values(sizes: Sizes, tensors: list[Tensor]) -> dict[Any, int]:
    """What the symbols of a program stand for in its example inputs."""
    found: dict[Any, int] = {}
    for each, tensor in zip(sizes, tensors, strict=True):
        for size, number in zip(each, tensor.shape, strict=True):
            if not isinstance(size, int) and len(size.free_symbols) == 1:
                symbol = next(iter(size.free_symbols))
                found.setdefault(symbol, int(sympy.solve(size - number, symbol)[0]))
    return found


def _within(program: ExportedProgram, symbol: Any, value: int) -> int:
    """The value nearest to `value` in the range of a symbol; that begins at 2 where 1 is taken for no special case."""
    range_ = program.range_constraints.get(symbol)
    if range_ is None:
        return value
    value = max(value, 1 if range_.lower <= 2 else int(range_.lower))
    return int(min(value, range_.upper))


def _sized(x: Tensor, sizes: list[int]) -> Tensor:
    """A tensor of other sizes, with the entries of `x` over and over."""
    for dim, size in enumerate(sizes):
        if size != x.shape[dim]:
            x = x.index_select(dim, torch.arange(size) % x.shape[dim])
    return x
