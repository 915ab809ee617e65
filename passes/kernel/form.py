"""What is known of a layer's calls before there are tensors: its form, and the plan for inputs of one shape."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from passes.errors import InputError
from passes.kernel.codegen.activations import activation
from passes.kernel.codegen.object_code import Library, library
from passes.kernel.codegen.plane_kernels import COMBINE
from passes.kernel.codegen.target import MOST_FILTERS, Target, host
from passes.kernel.codegen.window_kernel import AT_ONCE, STRIDES, window_symbol
from passes.kernel.layout.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.layout.packing import Structure
from passes.kernel.layout.plane_schedule import mean_schedule, pixel_schedule, pointwise_schedule, window_schedule
from passes.kernel.layout.schedule import DEFAULT_TILING, Job, Schedule, Tiling, schedule
from passes.kernel.runtime.call_record import LAYER, MEAN, PIXEL, POINTWISE, WINDOW, Call

_IOTA = (ctypes.c_int64 * MOST_FILTERS)(*range(MOST_FILTERS))


@dataclass(frozen=True)
class Placement:
    """Margins of what a layer reads, of what it adds, and of what it writes; the default is none."""

    reads: Margins = NO_MARGINS
    adds: Margins = NO_MARGINS
    writes: Margins = NO_MARGINS


NO_PLACEMENT = Placement()


@dataclass(frozen=True)
class Form:
    """How a layer is computed, apart from its weights.

    Attributes:
        geometry: kernel, stride, padding, dilation, channels.
        activation: name of the activation, or None.
        placement: the margins of input, residual and result.
        tiling: how the work is cut.
        target: micro-kernels to use instead of the machine's own, or None (for tests).
    """

    geometry: Geometry
    activation: str | None = None
    placement: Placement = NO_PLACEMENT
    tiling: Tiling = DEFAULT_TILING
    target: Target | None = None


@dataclass(frozen=True)
class PlaneForm:
    """How a step is computed that is no layer: it takes each channel for itself.

    Attributes:
        does: ``"nothing"`` (but the activation), ``"sum"``, ``"product"``, ``"gate"`` (a product with one number of
            each channel), ``"mean"`` (of a picture), ``"largest"`` (in each window).
        activation: name of the activation, or None.
        placement: the margins of the input, of the second one, and of the result.
        window: geometry of the windows, or None.
        target: kernels to use instead of the machine's own, or None (for tests).
    """

    does: str
    activation: str | None = None
    placement: Placement = NO_PLACEMENT
    window: Geometry | None = None
    target: Target | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A form for inputs of one shape: all that a call needs besides its tensors.

    Attributes:
        schedule: how the work is divided.
        template: the call, without the addresses of tensors.
        out_shape: shape of the result, margins included.
        residual_shape: shape of what is added, margins included, or None.
        reads_from: numbers between the start of the input and the first pixel of its picture.
        adds_from: the same for the residual.
        library: keeps the code alive.
    """

    schedule: Schedule
    template: Call
    out_shape: tuple[int, ...]
    residual_shape: tuple[int, ...] | None
    reads_from: int
    adds_from: int
    library: Library


@cache
def compiled() -> tuple[Any, int]:
    """The driver's function, callable and as an address."""
    from passes.kernel.runtime.driver import run_steps

    return run_steps.ctypes, run_steps.address


def prepare(target: Target | None = None) -> Target:
    """Compile the kernel for this machine, or load it from the cache, so that no later call has to.

    Returns the target. Where the kernel can't run, raises `InputError` with the reason.
    """
    found = host() if target is None else target
    if isinstance(found, str):
        raise InputError(found)
    compiled()
    library(found)
    return found


def output_shape(shape: Any, form: Form, margins: Margins) -> tuple[Any, Any, Any, Any]:
    """Shape of a result in `margins` for an input of `shape`, ``[N, C, H, W]`` with the margins that the form reads."""
    rows, columns = form.geometry.output_size(*form.placement.reads.picture_size(shape))
    return shape[0], form.geometry.out_channels, margins.top + rows + margins.bottom, columns + margins.right


@lru_cache(maxsize=4096)
def plan(form: Form, shape: tuple[int, ...], has_residual: bool, structure: Structure, team: int) -> Plan:
    """Plan the calls of a layer's form for inputs of `shape`, on `team` threads."""
    geometry, placement = form.geometry, form.placement
    if len(shape) != 4 or shape[1] != geometry.in_channels:
        raise InputError(f"the layer reads [N, {geometry.in_channels}, H, W], not [N, {str(list(shape[1:]))[1:]}")
    target = prepare(form.target)
    height, width = placement.reads.picture_size(shape)
    adds = placement.adds if has_residual else None
    kind = _kind(form, shape, has_residual, structure, target)
    if kind == PIXEL:
        found = pixel_schedule(geometry, shape, placement.reads, adds, placement.writes, structure.pieces, team)
    elif kind == WINDOW:
        found = window_schedule(geometry, shape, placement.reads, placement.writes, team, tables=False)
    else:
        found = schedule(
            Job(geometry, form.tiling, shape[0], height, width, placement.reads, adds, placement.writes,
                structure.pieces, target.lanes, team)
        )  # fmt: skip
    call = _completed(found, kind, form.activation, target)
    call.iota, call.block_count = ctypes.addressof(_IOTA), structure.pieces
    _find_windows(call, target, largest=False)
    return Plan(
        schedule=found,
        template=call,
        out_shape=output_shape(shape, form, placement.writes),
        residual_shape=output_shape(shape, form, placement.adds) if has_residual else None,
        reads_from=placement.reads.top * call.picture_row,
        adds_from=placement.adds.top * call.residual_row,
        library=library(target),
    )


def plane_shape(shape: Any, form: PlaneForm) -> tuple[Any, Any, Any, Any]:
    """Shape of what a step makes of an input of `shape`, ``[N, C, H, W]`` with the margins that the form reads."""
    size, margins = form.placement.reads.picture_size(shape), form.placement.writes
    if form.does == "mean":
        size = (1, 1)
    elif form.window is not None:
        size = form.window.output_size(*size)
    return shape[0], shape[1], margins.top + size[0] + margins.bottom, size[1] + margins.right


@lru_cache(maxsize=4096)
def plan_plane(form: PlaneForm, shape: tuple[int, ...], has_second: bool, team: int) -> Plan:
    """Plan the calls of a step that is no layer, for inputs of `shape`, on `team` threads."""
    reads, adds, writes = form.placement.reads, form.placement.adds, form.placement.writes
    if len(shape) != 4 or has_second != (form.does in ("sum", "product", "gate")):
        count = "two inputs" if has_second else "one input"
        raise InputError(f"a step that does {form.does!r} can't be called with {count} of {list(shape)}")
    target, second = prepare(form.target), None
    if form.does == "mean":
        found, kind = mean_schedule(shape, reads, writes, team), MEAN
    elif form.window is not None:
        found, kind = window_schedule(form.window, shape, reads, writes, team, tables=True), WINDOW
    else:
        found = pointwise_schedule(shape, reads, adds if has_second else None, writes, form.does == "gate", team)
        height, width = (1, 1) if form.does == "gate" else reads.picture_size(shape)
        kind, second = POINTWISE, (*shape[:2], adds.top + height + adds.bottom, width + adds.right)
    call = _completed(found, kind, form.activation, target)
    call.combine = COMBINE.index(form.does) if form.does in COMBINE else 0
    _find_windows(call, target, largest=True)
    return Plan(
        schedule=found,
        template=call,
        out_shape=plane_shape(shape, form),
        residual_shape=second if has_second else None,
        reads_from=reads.top * call.picture_row,
        adds_from=adds.top * call.residual_row,
        library=library(target),
    )


def moves_window(form: Form, structure: Structure) -> bool:
    """Whether a layer that adds nothing is computed by moving a window over each channel, on the picture as it is."""
    stride = form.geometry.stride
    return structure.depthwise and not structure.bounded and stride != (1, 1) and stride[1] in STRIDES


def _kind(form: Form, shape: tuple[int, ...], has_residual: bool, structure: Structure, target: Target) -> int:
    """Which of the ways to compute a layer fits its pictures."""
    geometry = form.geometry
    is_pixel = form.placement.reads.picture_size(shape) == (1, 1) and geometry.kernel_size == (1, 1)
    if is_pixel and not any(geometry.padding) and not structure.bounded and shape[0] < target.lanes:
        return PIXEL
    return WINDOW if moves_window(form, structure) and not has_residual else LAYER


def _completed(found: Schedule, kind: int, activation_name: str | None, target: Target) -> Call:
    """A schedule's call with what doesn't follow from sizes."""
    call, does = Call.from_buffer_copy(found.template), activation(activation_name)
    call.kind, call.kernels = kind, ctypes.addressof(library(target).addresses)
    call.code, call.low, call.high = does.code, does.low, does.high
    return call


def _find_windows(call: Call, target: Target, largest: bool) -> None:
    """Find the kernels of a step that moves a window."""
    if call.kind == WINDOW:
        symbols = (window_symbol(channels, call.stride_width, largest) for channels in (AT_ONCE, 1))
        call.window_kernel, call.window_kernel_of_one = map(library(target).address, symbols)
