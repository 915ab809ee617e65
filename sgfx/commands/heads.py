"""A new head: what a trained classifier needs to learn other classes.

The head is the last linear layer that runs and gives as many values as the model has scores, under whatever name
(`fc`, `classifier.1`, `head`). A model that ends in anything else keeps it, and says so.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.layers import GroupedLinear
from sgfx.training.modules import preserved_modes


def replace_head(model: nn.Module, inputs: Tensor, classes: int) -> None:
    """Put a linear layer with random weights in the place of a classifier's head.

    Args:
        model: gives scores ``[N, classes]``; dense or compiled. It is changed in place.
        inputs: images that it takes, on its device.
        classes: scores that it shall give.

    Raises:
        InputError: fewer than two classes, or its scores come from no linear layer.
    """
    if classes < 2:
        raise InputError(f"head is the number of classes, at least 2, not {classes}")
    names = _scorers(model, inputs)
    if not names:
        raise InputError(
            f"{type(model).__name__} has no linear layer that gives its scores, so its head can't be replaced: make it "
            f"for {classes} classes (--model_options.num_classes {classes} for most), and give a checkpoint of that"
        )
    old: Any = model.get_submodule(names[0])
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None, device=inputs.device, dtype=old.weight.dtype)
    for name in names:
        model.set_submodule(name, new)


def _scorers(model: nn.Module, inputs: Tensor) -> list[str]:
    """The names of the last linear layer that is as wide as the model's scores; several, where it has several."""
    calls: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        calls.append((module, output.shape[-1]))

    with ExitStack() as hooks, torch.no_grad(), preserved_modes(model):
        for module in model.modules():
            if isinstance(module, nn.Linear | GroupedLinear):
                hooks.callback(module.register_forward_hook(note).remove)
        scores = model.eval()(inputs)
    wide = scores.shape[-1] if isinstance(scores, Tensor) else None
    last = next((module for module, width in reversed(calls) if width == wide), None)
    return [name for name, module in model.named_modules(remove_duplicate=False) if name and module is last]
