"""Whether data look like what a network was trained on: what its norms see, against their running statistics.

A channel whose values have mean m and variance v, where the norm has learnt μ and σ², is off by the divergence of the
two normal distributions,

    ½ (v/σ² + (m − μ)²/σ² − 1 − ln(v/σ²)),

0 where they are equal, ½ where the mean is one standard deviation off. A norm is off by the mean over its channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.calibration.data import Arguments
from passes.errors import let_memory_errors_pass
from passes.models.copying import copy_inputs, unhooked_copy
from passes.options.arguments import call_model

LEAST = 32  # values of a channel, below which they say nothing of its statistics


class SeenNorm(NamedTuple):
    """What a norm sees, against its running statistics.

    Attributes:
        path: of the norm.
        divergence: mean over the channels; 0 where the norm sees what it has learnt.
        shift: how far the means are off, in standard deviations: root mean square over the channels.
        spread: the variance over the running one: geometric mean over the channels.
    """

    path: str
    divergence: float
    shift: float
    spread: float


def divergence(mean: Tensor, variance: Tensor, running_mean: Tensor, running_variance: Tensor) -> Tensor:
    """How far a normal distribution is from another, elementwise; variances are above 0.

    >>> one = torch.ones(3)
    >>> divergence(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 4.0]), 0 * one, one)
    tensor([0.0000, 0.5000, 0.8069])
    """
    ratio = variance / running_variance
    return (ratio + (mean - running_mean).square() / running_variance - 1 - ratio.log()) / 2


def seen_by_norms(model: nn.Module, batches: Iterable[Arguments]) -> list[SeenNorm]:
    """Run a copy of a model, in eval mode and without hooks, and compare what each of its norms sees.

    Norms without running statistics, norms that were never trained, and those that see too little are left out. So are
    torchvision's frozen norms: their statistics are those of the network from before it was trained further. Nothing is
    found where the data do not fit the model: who works on them says what does not.
    """
    quiet = unhooked_copy(model).eval()
    norms = {path: module for path, module in quiet.named_modules() if _has_learnt(module)}
    seen: dict[str, _Moments] = {path: _Moments() for path in norms}
    with ExitStack() as hooks, torch.no_grad():
        for path, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(partial(_note, seen[path])).remove)
        for given in batches if norms else ():
            try:
                call_model(quiet, copy_inputs(given))
            except Exception as error:
                let_memory_errors_pass(error)
                return []
    return [_compared(path, norms[path], moments) for path, moments in seen.items() if moments.count >= LEAST]


class _Moments:
    """Mean and variance of each channel over all that was added, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.square: Any = 0.0  # the mean of squares

    def add(self, x: Tensor) -> None:
        """Take in values ``[N, C, …]``."""
        if not x.numel():
            return
        variance, mean = torch.var_mean(
            x if x.dtype == torch.float64 else x.float(), [0, *range(2, x.dim())], correction=0
        )
        count = x.numel() // x.shape[1]
        share = count / (self.count + count)
        self.mean = self.mean + share * (mean.double() - self.mean)
        self.square = self.square + share * (variance.double() + mean.double().square() - self.square)
        self.count += count


def _note(moments: _Moments, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 1:
        moments.add(inputs[0].detach())


def _has_learnt(norm: Any) -> bool:
    """Whether a module is a batch norm with statistics that are not those it starts with."""
    if not isinstance(norm, _BatchNorm):
        return False
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return False
    return bool(mean.any()) or not torch.equal(variance, torch.ones_like(variance))


def _compared(path: str, norm: Any, moments: _Moments) -> SeenNorm:
    eps = norm.eps
    mean, variance = moments.mean, (moments.square - moments.mean.square()).clamp(min=0) + eps
    learnt, spread = norm.running_mean.double(), norm.running_var.double() + eps
    off = divergence(mean, variance, learnt, spread)
    shift = ((mean - learnt).square() / spread).mean().sqrt()
    return SeenNorm(path, float(off.mean()), float(shift), float((variance / spread).log().mean().exp()))
