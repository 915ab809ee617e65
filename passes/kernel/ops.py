"""The kernel as operations of torch, through which `torch.compile` and `torch.export` pass.

``torch.ops.sgfx.conv2d`` returns a new tensor, ``conv2d_out`` writes where it is told. They take everything as tensors
and integers: a graph that holds them needs nothing but this package. Registering a formula for the shape (a *fake*
kernel) is all that tracing asks for.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from passes.kernel.form import Form, Placement, output_shape
from passes.kernel.layout.geometry import Geometry, Margins
from passes.kernel.layout.packing import Tables
from passes.kernel.layout.schedule import Tiling
from passes.kernel.program import Packed, Wires, program, share_out

_LAYER = (
    "Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor inputs, Tensor ends, Tensor filters, "
    "Tensor blocks, int[] geometry, str activation, int[] margins, int[] tiling"
)
_library = torch.library.Library("sgfx", "DEF")  # type: ignore[no-untyped-call]
for _schema in (f"conv2d({_LAYER}) -> Tensor", f"conv2d_out({_LAYER}, Tensor(a!) out) -> ()"):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def conv2d(x: Tensor, residual: Tensor | None, tables: Tables, form: Form, out: Tensor | None = None) -> Tensor:
    """Call the operation with a layer's tables and form; with `out`, call the one that writes there, and return it."""
    geometry, placement = form.geometry, form.placement
    numbers = [
        geometry.out_channels, geometry.in_channels,
        *geometry.kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation,
    ]  # fmt: skip
    places = (placement.reads, placement.adds, placement.writes)
    margins = [number for each in places for number in (each.top, each.bottom, each.right)]
    tiling = [form.tiling.strip, form.tiling.tasks]
    arguments = (x, residual, *tables, numbers, form.activation or "", margins, tiling)
    if out is None:
        result: Tensor = torch.ops.sgfx.conv2d(*arguments)
        return result
    torch.ops.sgfx.conv2d_out(*arguments, out)
    return out


def _form(geometry: list[int], activation: str, margins: list[int], tiling: list[int]) -> Form:
    out_channels, in_channels, kh, kw, sh, sw, top, bottom, left, right, dh, dw = geometry
    return Form(
        Geometry(out_channels, in_channels, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw)),
        activation or None,
        Placement(Margins(*margins[:3]), Margins(*margins[3:6]), Margins(*margins[6:])),
        Tiling(*tiling),
    )


@torch.library.impl(_library, "conv2d", "CPU")
def _conv2d(
    x: Tensor, residual: Tensor | None,
    weight: Tensor, bias: Tensor, inputs: Tensor, ends: Tensor, filters: Tensor, blocks: Tensor,
    geometry: list[int], activation: str, margins: list[int], tiling: list[int],
) -> Tensor:  # fmt: skip
    form = _form(geometry, activation, margins, tiling)
    return _execute(x, residual, Tables(weight, bias, inputs, ends, filters, blocks), form, None)


@torch.library.impl(_library, "conv2d_out", "CPU")
def _conv2d_out(
    x: Tensor, residual: Tensor | None,
    weight: Tensor, bias: Tensor, inputs: Tensor, ends: Tensor, filters: Tensor, blocks: Tensor,
    geometry: list[int], activation: str, margins: list[int], tiling: list[int], out: Tensor,
) -> None:  # fmt: skip
    form = _form(geometry, activation, margins, tiling)
    _execute(x, residual, Tables(weight, bias, inputs, ends, filters, blocks), form, (out,))


def _execute(x: Tensor, residual: Tensor | None, tables: Tables, form: Form, outs: tuple[Tensor] | None) -> Tensor:
    inputs = (x,) if residual is None else (x, residual)
    wires = Wires(adds=None if residual is None else 1)
    return share_out(partial(program, [Packed(form, tables)], [wires], [0]), inputs, outs)[0]


@torch.library.register_fake("sgfx::conv2d_out", lib=_library)  # type: ignore[untyped-decorator]
def _conv2d_out_fake(*_: object) -> None:
    """Nothing to say: the shape is that of ``out``."""


@torch.library.register_fake("sgfx::conv2d", lib=_library)  # type: ignore[untyped-decorator]
def _conv2d_fake(
    x: Tensor, residual: Tensor | None,
    weight: Tensor, bias: Tensor, inputs: Tensor, ends: Tensor, filters: Tensor, blocks: Tensor,
    geometry: list[int], activation: str, margins: list[int], tiling: list[int],
) -> Tensor:  # fmt: skip
    form = _form(geometry, activation, margins, tiling)
    return x.new_empty(output_shape(x.shape, form, form.placement.writes))
