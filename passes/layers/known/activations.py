"""Activations that a layer may compute with its own result: one name each, however code writes them.

The kernel has formulas of its own under the same names (`passes/kernel/codegen/activations.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        module: torch's class of it.
        calls: torch's functions of it, and the names of its methods.
        apply: computes it in place.
    """

    module: type[nn.Module]
    calls: tuple[object, ...]
    apply: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"), torch.relu_),
    "relu6": Activation(nn.ReLU6, (F.relu6,), lambda y: F.hardtanh_(y, 0.0, 6.0)),
    "hardswish": Activation(nn.Hardswish, (F.hardswish,), lambda y: F.hardswish(y, inplace=True)),
    "silu": Activation(nn.SiLU, (F.silu,), lambda y: F.silu(y, inplace=True)),
    "hardsigmoid": Activation(nn.Hardsigmoid, (F.hardsigmoid,), lambda y: F.hardsigmoid(y, inplace=True)),
    "sigmoid": Activation(
        nn.Sigmoid, (torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), torch.sigmoid_
    ),
}
BY_MODULE = {each.module: name for name, each in ACTIVATIONS.items()}
BY_CALL = {call: name for name, each in ACTIVATIONS.items() for call in each.calls}


def activate(name: str | None, y: Tensor) -> Tensor:
    """Compute an activation on a fresh result, in place where that can be, and return it; None is the identity."""
    return y if name is None else ACTIVATIONS[name].apply(y)
