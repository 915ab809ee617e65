"""The kernel as operations of torch, through which `torch.compile` and `torch.export` pass.

``torch.ops.sgfx.conv2d`` returns a new tensor, ``conv2d_out`` writes where it is told. They take everything as tensors
and integers: a graph that holds them needs nothing but this package. Registering a formula for the shape (a *fake*
kernel) is all that tracing asks for.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from passes.kernel.form import Form, Placement, PlaneForm, output_shape, plane_shape
from passes.kernel.layout.geometry import Geometry, Margins
from passes.kernel.layout.packing import Tables
from passes.kernel.layout.schedule import Tiling
from passes.kernel.program import Step, Wires, program, share_out

_LAYER = (
    "Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor inputs, Tensor ends, Tensor filters, "
    "Tensor blocks, int[] geometry, str activation, int[] margins, int[] tiling"
)
_library = torch.library.Library("sgfx", "DEF")  # type: ignore[no-untyped-call]
_PLANE = "plane(Tensor x, Tensor? second, str does, str activation, int[] margins, int[] window) -> Tensor"
for _schema in (f"conv2d({_LAYER}) -> Tensor", f"conv2d_out({_LAYER}, Tensor(a!) out) -> ()", _PLANE):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def conv2d(x: Tensor, residual: Tensor | None, tables: Tables, form: Form, out: Tensor | None = None) -> Tensor:
    """Call the operation with a layer's tables and form; with `out`, call the one that writes there, and return it."""
    tiling = [form.tiling.strip, form.tiling.tasks]
    numbers = (_of_geometry(form.geometry), form.activation or "", _of_placement(form.placement), tiling)
    arguments = (x, residual, *tables, *numbers)
    if out is None:
        result: Tensor = torch.ops.sgfx.conv2d(*arguments)
        return result
    torch.ops.sgfx.conv2d_out(*arguments, out)
    return out


def plane(x: Tensor, second: Tensor | None, form: PlaneForm) -> Tensor:
    """Call the operation of a step that is no layer."""
    window = [] if form.window is None else _of_geometry(form.window)
    result: Tensor = torch.ops.sgfx.plane(
        x, second, form.does, form.activation or "", _of_placement(form.placement), window
    )
    return result


def _of_geometry(geometry: Geometry) -> list[int]:
    return [
        geometry.out_channels, geometry.in_channels,
        *geometry.kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation,
    ]  # fmt: skip


def _geometry(numbers: list[int]) -> Geometry:
    out_channels, in_channels, kh, kw, sh, sw, top, bottom, left, right, dh, dw = numbers
    return Geometry(out_channels, in_channels, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw))


def _of_placement(placement: Placement) -> list[int]:
    places = (placement.reads, placement.adds, placement.writes)
    return [number for each in places for number in (each.top, each.bottom, each.right)]


def _placement(numbers: list[int]) -> Placement:
    return Placement(Margins(*numbers[:3]), Margins(*numbers[3:6]), Margins(*numbers[6:]))


def _form(geometry: list[int], activation: str, margins: list[int], tiling: list[int]) -> Form:
    return Form(_geometry(geometry), activation or None, _placement(margins), Tiling(*tiling))


def _plane_form(does: str, activation: str, margins: list[int], window: list[int]) -> PlaneForm:
    return PlaneForm(does, activation or None, _placement(margins), _geometry(window) if window else None)


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
    return share_out(partial(program, [Step(form, tables)], [wires], [0]), inputs, outs)[0]


@torch.library.impl(_library, "plane", "CPU")
def _plane(
    x: Tensor, second: Tensor | None, does: str, activation: str, margins: list[int], window: list[int]
) -> Tensor:
    steps = [Step(_plane_form(does, activation, margins, window))]
    inputs = (x,) if second is None else (x, second)
    return share_out(partial(program, steps, [Wires(adds=None if second is None else 1)], [0]), inputs)[0]


@torch.library.register_fake("sgfx::plane", lib=_library)  # type: ignore[untyped-decorator]
def _plane_fake(
    x: Tensor, second: Tensor | None, does: str, activation: str, margins: list[int], window: list[int]
) -> Tensor:
    return x.new_empty(plane_shape(x.shape, _plane_form(does, activation, margins, window)))


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
