"""Chains: steps of a network that follow each other, run as one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.kernel.packed_layer import PackedConv2d, Programs, is_traced
from passes.kernel.plane_step import PlaneStep
from passes.kernel.program import Wires


class PackedChain(nn.Module):
    """Packed layers and steps that read each other's results; those that nobody else reads are never handed out.

    Args:
        layers: the layers and steps, in the order in which they run.
        wires: for each, what it reads, adds and writes.
        outputs: those whose results are returned.
    """

    _is_impure = True  # for torch.fx: it may write into its inputs

    def __init__(
        self, layers: Sequence[PackedConv2d | PlaneStep], wires: Sequence[Wires], outputs: Sequence[int]
    ) -> None:
        """Take over the layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.wires, self.outputs = tuple(wires), tuple(outputs)
        self._programs = Programs()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the chain: fp32 ``[N, C, H, W]``, margins included; a tuple unless there is one output."""
        traced = any(map(is_traced, inputs))
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise InputError("packed layers are for inference: they have no gradient. Call them under torch.no_grad()")
        if traced:
            results = self._one_by_one(inputs)
        else:
            layers: list[Any] = list(self.layers)
            results = self._programs.run(layers, self.wires, self.outputs, inputs)
        return results[0] if len(self.outputs) == 1 else tuple(results)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        known = list(inputs)
        modules: list[Any] = list(self.layers)
        for layer, wires in zip(modules, self.wires, strict=True):
            x = known[wires.reads]
            if isinstance(layer, PackedConv2d):
                x = x[:, : layer.form.geometry.in_channels]  # of a tensor that grows
            y = layer(x, None if wires.adds is None else known[wires.adds])
            if wires.into is not None:
                number, first = wires.into
                known[number][:, first : first + y.shape[1]].copy_(y)
            known.append(y)
        return [known[len(inputs) + index] for index in self.outputs]
