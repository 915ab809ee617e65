"""Masking: masked layers in place of the targets, with the masks of the present plans.

The first run puts masked layers in; later runs update their masks in place. Parameter objects stay the same throughout.
Without plans (before the first step) nothing is masked yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from passes.infra.compilation import Pass, Unit
from passes.layers.custom import masked_form
from passes.layers.masked import Masked
from passes.layers.plan import LayerPlan, attach_plan, detach_plan
from passes.layers.surgery import replace_module


def mask(model: nn.Module, plans: dict[str, LayerPlan]) -> bool:
    """Put the masks of `plans` into `model`, in place; return whether anything changed."""
    modified = False
    for path, plan in plans.items():
        layer = model.get_submodule(path)
        if plan.grouped:
            masked = masked_layer(model, path)
            modified |= masked.update(plan) or masked is not layer
            layer = masked
        attach_plan(layer, plan)
    return modified


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
    requires = ("plans",)

    def run(self, unit: Unit) -> bool:
        """Mask the model by its plans."""
        return mask(unit.model, unit.plans)

    def check(self, unit: Unit) -> str | None:
        """Every target's mask is what its plan keeps."""
        for path, plan in unit.plans.items():
            layer = unit.model.get_submodule(path)
            if plan.grouped and not (isinstance(layer, Masked) and torch.equal(layer.mask.cpu(), plan.mask())):
                return f"the mask of layer {path!r} is not the one that was planned"
        return None
