"""Adoption: what was worked out on a copy becomes the live model's own, once everything has succeeded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.cut import cuts
from passes.layers.grouped import Grouped
from passes.layers.surgery import replace_module
from passes.plan import attach_plan, plans


def adopt(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the grouped layers, cut modules, plans and values of `small`, a compiled copy of it, in place.

    All modules and parameters of `model` that `small` did not replace stay the same objects, biases included.
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
        bias, new = model.get_submodule(path)._parameters.get("bias"), layer._parameters.get("bias")
        if bias is not None and new is not None and bias.shape == new.shape:
            layer._parameters["bias"] = bias
        replace_module(model, path, layer)
    for path, plan in plans(small).items():
        attach_plan(model.get_submodule(path), plan)


def _differ(mine: Tensor, theirs: Tensor) -> bool:
    """Whether a value has to be copied. What is equal is not touched: it may be a tensor that can't be written to."""
    if mine.layout != torch.strided or mine.is_meta or mine.is_quantized:
        return True
    return not torch.equal(mine, theirs)
