"""Multiply-adds of single operations, from the shapes of what they read and give: one table for both counters.

Counted are convolutions and matrix products, however they are called: attention is its two products (queries with keys,
weights with values; a mask saves nothing), a recurrent layer those with its matrices at every step. The counters see
different operations: fvcore those that the model's code calls, torch's counter what these come down to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Arguments: TypeAlias = Sequence[Any]  # of an operation: in place of tensors their shapes, lists of these, else values
Formula: TypeAlias = Callable[[Arguments, Shape], int]  # from the arguments, and the shape of the (first) output


def _numel(shape: Sequence[int]) -> int:
    return prod(shape)


def _product(args: Arguments, out: Shape) -> int:
    """Every number of the output sums over the last dimension of the first factor."""
    return _numel(out) * int(args[0][-1])


def _sum_with_product(args: Arguments, out: Shape) -> int:
    return _product(args[1:], out)


def _sum_of_products(args: Arguments, out: Shape) -> int:
    return int(args[1][0]) * _product(args[1:], out)


def _tensordot(args: Arguments, out: Shape) -> int:
    return _numel(out) * _numel([args[0][dim] for dim in args[2]])


def _einsum(args: Arguments, out: Shape) -> int:
    """Of two factors: every number of the output sums over what both have and the output lacks."""
    terms, _, result = args[0].replace(" ", "").partition("->")
    if len(factors := terms.split(",")) > 2:
        raise NotImplementedError("what it costs depends on the order of the factors")
    if len(factors) < 2 or not (summed := set(factors[0]).intersection(factors[1]) - set(result) - {"."}):
        return 0  # it moves, sums or multiplies numbers: no matrix product
    return _numel(out) * _numel([max(_sizes_of(label, factors, args[1])) for label in summed])


def _sizes_of(label: str, factors: Sequence[str], shapes: Sequence[Shape]) -> Iterator[int]:
    for term, shape in zip(factors, shapes, strict=True):
        before, _, after = term.partition("...")
        yield shape[before.index(label)] if label in before else shape[after.index(label) - len(after)]


def _bilinear(args: Arguments, out: Shape) -> int:
    """``x1ᵀ W x2``, the product with ``x1`` first."""
    (left, right), rows = args[2][1:], _numel(out)
    return rows * int(right) * (int(left) + 1)


def _trilinear(args: Arguments, out: Shape) -> int:
    return _bilinear((args[0], args[2], args[1]), out)


def _convolution(args: Arguments, out: Shape) -> int:
    """Every number of the output, or of the input of a transposed one, meets the weights of one filter."""
    return _numel(args[0] if args[6] else out) * _numel(args[1][1:])


def _plain_convolution(args: Arguments, out: Shape) -> int:
    return _numel(out) * _numel(args[1][1:])


def _convolution_of_steps(args: Arguments, out: Shape) -> int:
    return _numel(out) * _numel(args[1][:2])  # a weight [kernel, C_in, C_out]


def _attention(args: Arguments, out: Shape) -> int:
    """Queries ``[…, L, E]``, keys ``[…, S, E]`` and values ``[…, S, V]``."""
    queries, keys, values = args[:3]
    return _numel(out[:-1]) * int(keys[-2]) * int(queries[-1] + values[-1])


def _recurrent(args: Arguments, out: Shape) -> int:
    """Every step of every sequence meets all matrices."""
    shapes = [shape for arg in args if isinstance(arg, list) for shape in arg if isinstance(shape, tuple)]
    return _numel(args[0][:-1]) * sum(_numel(shape) for shape in shapes if len(shape) == 2)


def _recurrent_layer(args: Arguments, out: Shape) -> int:
    return _recurrent((args[0], list(args[1:3])), out)


def _unknown(args: Arguments, out: Shape) -> int:
    raise NotImplementedError("what it costs depends on the order of the factors")


KERNELS: dict[str, Formula] = {  # what everything comes down to
    **dict.fromkeys(("mm", "bmm", "_int_mm", "mv", "dot", "vdot"), _product),
    **dict.fromkeys(("addmm", "_addmm_activation", "baddbmm", "addmv"), _sum_with_product),
    "addbmm": _sum_of_products,
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "conv_tbc": _convolution_of_steps,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _recurrent_layer,
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent),
    **{
        f"_scaled_dot_product_{kernel}": _attention
        for kernel in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
}  # fmt: skip
CALLS: dict[str, Formula] = {  # what code calls, and torch takes apart
    **dict.fromkeys(("linear", "matmul", "inner"), _product),
    "tensordot": _tensordot,
    "einsum": _einsum,
    "bilinear": _bilinear,
    "_convolution_mode": _plain_convolution,  # with padding="same"
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), _unknown),
}
VISION: dict[str, Formula] = {"deform_conv2d": _plain_convolution}  # of torchvision


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles of `fvcore.nn.FlopCountAnalysis`, which counts a multiply-add as one."""

    def handle(formula: Formula) -> Callable[[list[Any], list[Any]], int]:
        return lambda inputs, outputs: formula([_traced(x) for x in inputs], _traced(outputs[0]))

    found = {f"aten::{name}": formula for name, formula in (KERNELS | CALLS).items()}
    found |= {f"torchvision::{name}": formula for name, formula in VISION.items()}
    return {name: handle(formula) for name, formula in found.items()}


def torch_formulas() -> dict[Any, Callable[..., int]]:
    """The ``custom_mapping`` of `torch.utils.flop_counter.FlopCounterMode`, which counts a multiply-add as two."""

    def counted(formula: Formula) -> Callable[..., int]:
        def flops(*args: Any, out_val: Any = None, **_: Any) -> int:
            first = out_val[0] if isinstance(out_val, tuple | list) else out_val
            return 2 * formula([_ran(x) for x in args], _ran(first))

        flops._get_raw = True  # type: ignore[attr-defined]  # the tensors, not their shapes
        return flops

    spaces = ((torch.ops.aten, KERNELS), (torch.ops.torchvision, VISION))
    known = [(getattr(space, name, None), formula) for space, table in spaces for name, formula in table.items()]
    return {operation: counted(formula) for operation, formula in known if operation is not None}


def _traced(value: Any) -> Any:
    """An argument in a traced graph; None for what isn't known there, which no formula takes for a shape."""
    if value.isCompleteTensor():
        return tuple(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_traced(each) for each in value.node().inputs()]
    return _ran(value.toIValue())


def _ran(value: Any) -> Any:
    if isinstance(value, list):
        return [_ran(each) for each in value]
    return tuple(value.shape) if isinstance(value, Tensor) else value
