"""Masked layers: dense layers that multiply their weight by a connection mask, for training between pruning steps.

They are subclasses of the torch layers and keep the dense ``weight`` under its own name, as the same parameter object,
so one optimizer serves all steps. The mask is a table ``[C_out, C_in]`` (`structured.py`) that steps update in place.
A pruned weight stays stored under the mask: a connection that a later step reopens starts from its stored value.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import InputError
from passes.layers.encoding import decode
from passes.layers.plan import LayerPlan, LayerShape, layer_shape, plan_of
from passes.layers.structured import Structured
from passes.layers.surgery import shallow_copy

L = TypeVar("L", bound="Masked")


class Masked(Structured):
    """What all masked layers share: a dense weight under a mask."""

    _mask: Tensor
    TABLES = ("_mask",)
    FORMER_BUFFERS = ("mask",)

    @classmethod
    def from_dense(cls: type[L], layer: nn.Module) -> L:
        """Make the masked twin of a dense layer, sharing its parameters, with nothing masked yet."""
        new = shallow_copy(layer, cls)
        new._set_structure(new._nothing_masked())
        new._follow_weight()
        return new

    @property
    def mask(self) -> Tensor:
        """Connections that remain, bool ``[C_out, C_in]``."""
        return self._mask

    def update(self, plan: LayerPlan) -> None:
        """Mask by a plan, in place."""
        self._set_structure(plan)

    def unmask(self) -> None:
        """Mask nothing, in place."""
        self._set_structure(self._nothing_masked())

    def masked_weight(self) -> Tensor:
        """The weight with 0 where a connection is pruned, ``[C_out, C_in, *kernel]``."""
        mask = self._beside_weight(self._mask)
        return torch.where(mask.view(*mask.shape, *[1] * (self.weight.dim() - 2)), self.weight, 0.0)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a mask where no plan says yet what is masked; elsewhere refuse another one."""
        super().set_extra_state(state)
        if plan_of(self) is None:
            self._set_structure(decode(state, self._shape()))

    def _shape(self) -> LayerShape:
        return layer_shape(self)

    def _set_structure(self, plan: LayerPlan) -> None:
        super()._set_structure(plan)
        self._mask = self._mask.copy_(plan.mask()) if "_mask" in self.__dict__ else plan.mask()

    def _former_structure(self, buffers: dict[str, Tensor]) -> LayerPlan:
        mask = buffers["mask"].cpu()
        if (mask.shape, mask.dtype) != (self.weight.shape[:2], torch.bool):
            raise InputError(f"mask is {mask.dtype} {list(mask.shape)}, no mask of it: it is damaged")
        return self._of_mask(mask)

    def _nothing_masked(self) -> LayerPlan:
        return self._of_mask(torch.ones(self.weight.shape[:2], dtype=torch.bool, device="cpu"))

    def _of_mask(self, mask: Tensor) -> LayerPlan:
        """A plan with this mask: the layer's own if it is that, else one that takes equal rows for groups."""
        plan = plan_of(self)
        if plan is not None and plan.grouped and torch.equal(plan.mask(), mask):
            return plan
        keep, labels = torch.unique(mask, dim=0, return_inverse=True)
        ratio = min(1 - float(mask.double().mean()), 1 - 1 / mask.numel())
        return LayerPlan.of(self, labels=labels, keep=keep, requested_ratio=ratio)

    def _difference(self, other: LayerPlan) -> str | None:
        if plan_of(self) is None or torch.equal(self._mask.cpu(), other.mask()):
            return None  # before the first step, what is loaded says what is masked
        return (
            "mask differs: the weights were saved at another pruning step. Load the state of the Pruner "
            "(pruner.load_state_dict), and make copies and averages of its model anew after each step"
        )


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
