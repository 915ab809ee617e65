"""Masking: masked layers in place of the targets, with the masks of the present plans.

The first run puts masked layers in; later runs update their masks in place. Parameter objects stay the same throughout.
Without plans (before the first step) nothing is masked yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from passes.compression.pruning import PLANS
from passes.infra.compilation import Compilation, Pass
from passes.layers.custom import masked_form
from passes.layers.masked import Masked
from passes.layers.plan import LayerPlan, attach_plan, detach_plan
from passes.layers.surgery import replace_module
from passes.tracing.regions import REGIONS


def mask(model: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Put the masks of `plans` into `model`, in place."""
    for path, plan in plans.items():
        layer = model.get_submodule(path)
        if plan.grouped:
            layer = masked_layer(model, path)
            layer.update(plan)
        attach_plan(layer, plan)


def unmask(model: nn.Module, paths: Iterable[str]) -> None:
    """Take the plans of the layers at `paths` away, in place, as before the first step: nothing is masked."""
    for path in paths:
        layer = model.get_submodule(path)
        detach_plan(layer)
        if isinstance(layer, Masked):
            layer.unmask()


def masked_layer(model: nn.Module, path: str) -> Masked:
    """Return the masked layer at `path`, made from the dense one there if need be."""
    layer = model.get_submodule(path)
    if not isinstance(layer, Masked):
        layer = masked_form(layer).from_dense(layer)
        replace_module(model, path, layer)
    return layer


class Masking(Pass):
    """Put masked layers in place of all targets."""

    name = "masking"
    requires = (PLANS,)
    ends = (REGIONS,)

    def run(self, compilation: Compilation) -> None:
        """Mask the model by its plans."""
        mask(compilation.model, compilation[PLANS])

    def check(self, compilation: Compilation) -> str | None:
        """Every target's mask is what its plan keeps."""
        for path, plan in compilation[PLANS].items():
            layer = compilation.model.get_submodule(path)
            if plan.grouped and not (isinstance(layer, Masked) and torch.equal(layer.mask.cpu(), plan.mask())):
                return f"the mask of layer {path!r} is not the one that was planned"
        return None
