"""How far the outputs of a model are from those of another: one number, whatever they mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes.errors import InputError
from passes.models.values import shapes_of, tensors_in


def distance(outputs: Any, wanted: Any) -> Tensor:
    """How far `outputs` are from `wanted`: the squared error over the variance of what is wanted, over all tensors.

    It is 0 where they agree, and about 1 where the outputs say nothing. It has no temperature and asks nothing of what
    they mean; tensors without elements have no say. Differentiable in `outputs`.

    Raises:
        InputError: their floating-point tensors differ in number or shape, or there are none with numbers in them.
    """
    own, goal = floating_tensors(outputs), floating_tensors(wanted)
    if shapes(own) != shapes(goal) or not goal:
        raise InputError(
            f"the model's outputs {shapes_of(outputs)} can't be compared with the teacher's {shapes_of(wanted)}: they "
            "must be the same tensors of floating-point numbers"
        )
    parts = [relative_error(x, y, variance_of(y)) for x, y in zip(own, goal, strict=True) if y.numel()]
    if not parts:
        raise InputError(f"the teacher's outputs {shapes_of(wanted)} hold no numbers: nothing can be learnt from them")
    return torch.stack(parts).mean()


def floating_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of floating-point numbers among outputs, in order."""
    return [x for x in tensors_in(outputs) if x.is_floating_point()]


def shapes(tensors: list[Tensor]) -> list[torch.Size]:
    """The shape of each tensor."""
    return [x.shape for x in tensors]


def relative_error(x: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """The mean squared error of `x`, over a variance."""
    return (x.float() - wanted.float()).square().mean() / variance


def variance_of(x: Tensor) -> Tensor:
    """The variance of numbers, or their mean square where they are all the same, and 1 where that is 0."""
    x = x.detach().float()
    variance, power = (x - x.mean()).square().mean(), x.square().mean()
    scale = torch.where(variance > 1e-10 * power, variance, power)
    return torch.where(scale < torch.finfo(x.dtype).tiny, 1.0, scale)
