"""Adoption: what was worked out on a copy becomes the live model's own, once everything has succeeded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.layers.channel_cut import cuts
from passes.layers.custom import Custom
from passes.layers.grouped import Grouped
from passes.layers.plan import attach_plan, plans
from passes.layers.surgery import replace_module


def adopt(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the grouped layers, cut modules, plans and values of `small`, a compiled copy of it, in place.

    All modules and parameters of `model` that `small` did not replace stay the same objects: biases too, and what is
    inside a custom layer.
    """
    cut = cuts(small)
    replaced = {path: m for path, m in small.named_modules() if isinstance(m, Grouped) or path in cut}
    theirs = dict([*small.named_parameters(), *small.named_buffers()])
    with torch.no_grad():
        for name, mine in [*model.named_parameters(), *model.named_buffers()]:
            same = name in theirs and theirs[name].shape == mine.shape  # else it goes with the module that is replaced
            if same and _differ(mine, theirs[name]):
                mine.copy_(theirs[name])
    for path, layer in replaced.items():
        old = model.get_submodule(path)
        for name, own in old._parameters.items():
            new = layer._parameters.get(name)
            if own is not None and new is not None and own.shape == new.shape:
                layer._parameters[name] = own
        layer._modules.update(old._modules)  # of a custom layer; what is replaced below it has its turn later
        if isinstance(layer, Custom):
            layer._buffers.update(old._buffers)
        replace_module(model, path, layer)
    for path, plan in plans(small).items():
        attach_plan(model.get_submodule(path), plan)


def _differ(mine: Tensor, theirs: Tensor) -> bool:
    """Whether a value has to be copied. What is equal is not touched: it may be a tensor that can't be written to."""
    if mine.layout != torch.strided or mine.is_meta or mine.is_quantized:
        return True
    return not torch.equal(mine, theirs)
