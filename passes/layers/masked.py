"""Masked layers: dense layers that multiply their weight by a connection mask, for training between pruning steps.

They are subclasses of the torch layers and keep the dense ``weight`` under its own name, as the same parameter object,
so one optimizer serves all steps. The mask is a persistent buffer ``[C_out, C_in]`` that steps update in place.
A pruned weight stays stored under the mask: a connection that a later step reopens starts from its stored value.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import InputError
from passes.layers.surgery import shallow_copy

L = TypeVar("L", bound="Masked")


class Masked(nn.Module):
    """What all masked layers share: a dense weight under a mask."""

    weight: Tensor
    mask: Tensor

    @classmethod
    def from_dense(cls: type[L], layer: nn.Module) -> L:
        """Make the masked twin of a dense layer, sharing its parameters, with nothing masked yet."""
        new = shallow_copy(layer, cls)
        new.register_buffer("mask", torch.ones(new.weight.shape[:2], dtype=torch.bool, device=new.weight.device))
        return new

    def masked_weight(self) -> Tensor:
        """The weight with 0 where a connection is pruned, ``[C_out, C_in, *kernel]``."""
        mask = self.mask.view(*self.mask.shape, *[1] * (self.weight.dim() - 2))
        return torch.where(mask, self.weight, 0.0)


class MaskedConv1d(Masked, nn.Conv1d):
    """A `Conv1d` that multiplies its weight by a mask."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[N, C_in, L]`` with the masked weight."""
        output: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return output


class MaskedConv2d(Masked, nn.Conv2d):
    """A `Conv2d` that multiplies its weight by a mask."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[N, C_in, H, W]`` with the masked weight."""
        output: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return output


class MaskedConv3d(Masked, nn.Conv3d):
    """A `Conv3d` that multiplies its weight by a mask."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[N, C_in, D, H, W]`` with the masked weight."""
        output: Tensor = self._conv_forward(input, self.masked_weight(), self.bias)
        return output


class MaskedLinear(Masked, nn.Linear):
    """A `Linear` that multiplies its weight by a mask."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[…, C_in]`` to ``[…, C_out]`` with the masked weight."""
        return F.linear(input, self.masked_weight(), self.bias)


MASKED: dict[type[nn.Module], type[Masked]] = {
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.Linear: MaskedLinear,
}


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that a dense or masked layer computes with, ``[C_out, C_in, *kernel]``, detached."""
    with torch.no_grad():
        weight = layer.masked_weight() if isinstance(layer, Masked) else layer.weight
    if not isinstance(weight, Tensor):
        raise InputError(f"{type(layer).__name__} has no dense weight")
    return weight.detach()
