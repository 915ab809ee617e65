"""Packed layers: what `freeze` puts in the place of a layer that the kernel computes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from passes.errors import InputError
from passes.kernel import ops
from passes.kernel.codegen.activations import activation as known_activation
from passes.kernel.form import NO_PLACEMENT, Form, Placement, plan, prepare
from passes.kernel.layout.geometry import Geometry
from passes.kernel.layout.packing import Block, Tables, pack
from passes.kernel.layout.schedule import DEFAULT_TILING, Tiling
from passes.kernel.program import Program, Step, Wires, program, share_out
from passes.kernel.runtime import threads

_MOST_PROGRAMS = 256  # of one module: pictures may come in any size, for as long as a server runs


def is_traced(x: Tensor) -> bool:
    """Whether a call is to be written down, by `torch.compile`, `torch.export` or `torch.jit.trace`, not to be run."""
    if not isinstance(x, Tensor):
        raise TypeError(f"a frozen model takes tensors, not {type(x).__name__}: for an array, torch.from_numpy(x)")
    compiling = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return type(x) is not Tensor or compiling or _get_current_dispatch_mode() is not None


class Programs:
    """The programs of some steps, by the shapes of their inputs.

    A program is made anew if a step has another form, or its tensors lie elsewhere than when it was made. Programs
    point to memory of this process, so a copy has none.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._known: dict[Any, tuple[list[int], Program]] = {}

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        """Copy and pickle none."""
        return Programs, ()

    def run(
        self, layers: Sequence[Any], wires: Sequence[Wires], outputs: Sequence[int],
        inputs: Sequence[Tensor], outs: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor]:  # fmt: skip
        """Run the steps; see `program` and `share_out` for the arguments."""
        now = [id(layer.form) for layer in layers] + [x.data_ptr() for layer in layers for x in layer.tables or ()]

        def find(shapes: Sequence[Sequence[int]], team: int) -> Program:
            key = (*map(tuple, shapes), team)
            made, found = self._known.get(key, (None, None))
            if found is None or made != now:
                found = program([Step(each.form, each.tables) for each in layers], wires, outputs, shapes, team)
                if len(self._known) >= _MOST_PROGRAMS:
                    self._known.clear()
                self._known[key] = now, found  # the program keeps all parts, so that no other object gets their ids
            return found

        return share_out(find, inputs, outs)


class PackedConv2d(nn.Module):
    """A convolution for inference: constant packed weights, a fused residual sum and activation, margins if wanted."""

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    ends: Tensor
    filters: Tensor
    blocks: Tensor

    def __init__(self, tables: Tables, form: Form) -> None:
        """Hold the tables as buffers; see `pack_blocks`."""
        super().__init__()
        for name, tensor in tables._asdict().items():
            self.register_buffer(name, tensor)
        self.form = form  # how the layer is computed; assign another one to change the tiling or the placement
        self._programs = Programs()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``activation(conv(x) + residual)``: fp32 ``[N, C, H, W]``, each with its margins of the form."""
        return self._run(x, residual, None)

    def write(self, out: Tensor, x: Tensor, residual: Tensor | None = None) -> None:
        """Compute the same into `out`, which may be a range of the channels of a wider tensor."""
        self._run(x, residual, out)

    def _run(self, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        traced = is_traced(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("a packed layer is for inference: it has no gradient. Call it under torch.no_grad()")
        if traced:
            return ops.conv2d(x, residual, self.tables, self.form, out)
        inputs = (x,) if residual is None else (x, residual)
        wires = Wires(adds=None if residual is None else 1)
        return self._programs.run([self], [wires], [0], inputs, None if out is None else (out,))[0]

    @property
    def tables(self) -> Tables:
        """The packed layer."""
        return Tables(**self._buffers)  # type: ignore[arg-type]  # registered from just these fields

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        geometry = self.form.geometry
        return (
            f"{geometry.in_channels}, {geometry.out_channels}, kernel_size={geometry.kernel_size}, "
            f"stride={geometry.stride}, padding={geometry.padding}, dilation={geometry.dilation}, "
            f"activation={self.form.activation!r}, pieces={len(self.blocks) - 1}"
        )


class PackedLinear(PackedConv2d):
    """A linear layer for inference: the convolution of pictures of one pixel."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``activation(linear(x) + residual)``: fp32 ``[…, C_in]`` to ``[…, C_out]``."""
        pictures = x.reshape(-1, x.shape[-1], 1, 1) if x.numel() else x.new_empty(0, x.shape[-1], 1, 1)
        geometry = self.form.geometry
        more = None if residual is None else residual.reshape(-1, geometry.out_channels, 1, 1)
        return super().forward(pictures, more).reshape(*x.shape[:-1], geometry.out_channels)


def pack_blocks(
    blocks: Sequence[Block],
    geometry: Geometry,
    bias: Tensor | None = None,
    *,
    linear: bool = False,
    ends: Tensor | None = None,
    activation: str | None = None,
    placement: Placement = NO_PLACEMENT,
    tiling: Tiling = DEFAULT_TILING,
) -> PackedConv2d:
    """Pack blocks of filters into a layer for inference. Compiles the kernel if this machine has not done so yet.

    Args:
        blocks: the filters, with what they read; filters in none of them yield their bias alone.
        geometry: kernel, stride, padding, dilation, channels.
        bias: fp32 ``[out_channels]``, or None.
        linear: make a `PackedLinear`, of filters with one tap, else a `PackedConv2d`.
        ends: ``[in_channels, 2]``, the least and the largest number that each input counts as, or None. Not for layers
            with padding.
        activation: name of the activation, or None.
        placement: the margins of x, residual and result.
        tiling: how the work is cut.
    """
    known_activation(activation)
    form = Form(geometry, activation, placement, tiling)
    target = prepare(form.target)
    tables = pack(blocks, bias, geometry, target.most_filters, ends)
    return (PackedLinear if linear else PackedConv2d)(tables, form)


def tilings(packed: PackedConv2d, shape: Sequence[int]) -> list[Tiling]:
    """Tilings worth timing for inputs of `shape`: those that cut the work differently."""
    found: dict[tuple[int, int], Tiling] = {}
    for tiling in (DEFAULT_TILING, Tiling(strip=14), Tiling(strip=56), Tiling(tasks=2)):
        form = replace(packed.form, tiling=tiling)
        call = plan(form, tuple(shape), False, packed.tables.structure(), threads.available()).template
        found.setdefault((call.strips, call.chunks), tiling)
    return list(found.values())
