"""What training puts around a model: a wrapper to be marked in its place, averages of it, its modes put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from passes.models import copy_model


class Wrapped(nn.Module):
    """Calls a model. accelerate's ``prepare`` replaces the forward of what it is given, and leaves marks on it."""

    def __init__(self, model: nn.Module) -> None:
        """Hold the model."""
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """Call it."""
        return self.model(*inputs)


def averages(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's parameters and buffers, on its device; it begins with the first."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    made = AveragedModel(nn.Module(), multi_avg_fn=average, use_buffers=True)
    made.module = copy_model(model)  # its own copy would be deep, hooks and what they hold included
    return made.to(next(model.parameters()).device)


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back in its mode on leaving, whatever happened inside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
