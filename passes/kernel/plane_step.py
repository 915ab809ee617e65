"""Steps that are no layers, as modules: what a chain runs between its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.kernel import ops
from passes.kernel.form import PlaneForm
from passes.kernel.packed_layer import Programs, is_traced
from passes.kernel.program import Wires


class PlaneStep(nn.Module):
    """A sum, product, gate or activation, the mean of pictures, or the largest numbers in windows; see `PlaneForm`."""

    tables = None  # which layers have

    def __init__(self, form: PlaneForm) -> None:
        """Hold the form; assign another one to change the placement."""
        super().__init__()
        self.form = form
        self._programs = Programs()

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """Compute the step: fp32 ``[N, C, H, W]``, each with its margins of the form."""
        if is_traced(x):
            return ops.plane(x, second, self.form)
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("a step is for inference: it has no gradient. Call it under torch.no_grad()")
        inputs = (x,) if second is None else (x, second)
        return self._programs.run([self], [Wires(0, None if second is None else 1)], [0], inputs)[0]

    def extra_repr(self) -> str:
        """What `print` shows of the step."""
        return f"{self.form.does!r}, activation={self.form.activation!r}"
