"""Adoption: what was worked out on a copy becomes the live model's own, once everything has succeeded."""

from __future__ import annotations

import torch
from torch import nn

from passes.cut import cuts
from passes.layers.grouped import Grouped
from passes.layers.surgery import carry_hooks, replace_module
from passes.plan import attach_plan, plans


def adopt(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the grouped layers, cut modules, plans and values of `small`, a compiled copy of it, in place.

    All modules and parameters of `model` that `small` did not replace stay the same objects, biases included.
    """
    cut = cuts(small)
    replaced = [(path, m) for path, m in small.named_modules() if isinstance(m, Grouped) or path in cut]
    for path, layer in replaced:
        old = model.get_submodule(path)
        carry_hooks(old, layer)
        bias, new = old._parameters.get("bias"), layer._parameters.get("bias")
        if isinstance(bias, nn.Parameter) and new is not None and bias.shape == new.shape:
            bias.data.copy_(new.data)
            layer._parameters["bias"] = bias
        replace_module(model, path, layer)
    theirs = dict([*small.named_parameters(), *small.named_buffers()])
    with torch.no_grad():
        for name, mine in [*model.named_parameters(), *model.named_buffers()]:
            if theirs[name] is not mine:
                mine.copy_(theirs[name])
    for path, plan in plans(small).items():
        attach_plan(model.get_submodule(path), plan)
