"""Modules of the inference form that call the library: a layer with what follows it, a norm on its own, a pooling.

The scale of a norm behind a layer goes into the layer's filters, and its shift into the bias.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.layers.channel_cut import Cut, smaller
from passes.layers.grouped import Grouped
from passes.layers.known.activations import activate
from passes.layers.known.geometry import conv_groups, padding_list
from passes.layers.known.norms import scale_and_shift
from passes.layers.surgery import shallow_copy


class Recipe(nn.Module):
    """A layer and what follows it, in a graph being rewritten: ``activation(scale · layer(x) + shift + residual)``.

    Attributes:
        layer: the layer as it was, dense or regrouped.
        path: its module path.
        scale, shift: float64 ``[C_out]`` of the norms folded in, or None.
        ends: ``[C_in, 2]``, the numbers between which each input is kept, or None.
        activation: name of what is done at the end, or None.
    """

    scale: Tensor | None
    shift: Tensor | None
    ends: Tensor | None
    activation: str | None

    def __init__(self, layer: nn.Module, path: str) -> None:
        """Take a convolution or linear layer, with nothing fused yet."""
        super().__init__()
        self.layer, self.path, self.activation = layer, path, None
        self.scale = self.shift = self.ends = None

    def fold(self, norm: nn.Module) -> None:
        """Fold a norm in that follows."""
        scale, shift = scale_and_shift(norm)
        self.scale = scale if self.scale is None else self.scale * scale
        self.shift = shift if self.shift is None else self.shift * scale + shift

    def add(self, constant: Tensor) -> None:
        """Add a constant, ``[C_out]``, to what the layer computes, before the norms."""
        scale = torch.ones_like(constant, dtype=torch.float64) if self.scale is None else self.scale
        shift = scale * constant
        self.scale, self.shift = scale, shift if self.shift is None else self.shift + shift

    def scale_inputs(self, scale: Tensor) -> None:
        """Multiply what the layer reads by ``[C_in]``."""
        layer: Any = shallow_copy(self.layer, type(self.layer))
        weight: Tensor = layer.weight.detach()
        if isinstance(layer, Grouped):
            rows = layer.packed_rows(scale.expand(layer.dense_shape[:2]))
            factors = rows.view(-1, *[1] * (weight.dim() - 1))
        else:
            factors = scale.view(-1, *[1] * (weight.dim() - 2))
        layer._parameters["weight"] = nn.Parameter((weight * factors).to(weight.dtype), requires_grad=False)
        self.layer = layer

    def keep(self, filters: Tensor) -> None:
        """Keep these filters alone, int64."""
        self.layer = smaller(self.layer, Cut(outputs=filters))
        self.scale = None if self.scale is None else self.scale[filters]
        self.shift = None if self.shift is None else self.shift[filters]

    def weight(self) -> Tensor:
        """The dense weight of the layer as it is, ``[C_out, C_in, *kernel]``."""
        layer: Any = self.layer
        weight: Tensor = layer.dense_weight() if isinstance(layer, Grouped) else layer.weight
        return weight.detach()

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The dense weight ``[C_out, C_in, *kernel]`` and the bias ``[C_out]``, with the norms folded in."""
        layer: Any = self.layer
        weight = self.weight()
        bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
        if self.scale is not None and self.shift is not None:
            wide = weight.double() * self.scale.view(-1, *[1] * (weight.dim() - 1))
            shift = self.shift if bias is None else bias.double() * self.scale + self.shift
            weight, bias = wide.to(weight.dtype), shift.to(weight.dtype)
        return weight.clone(), None if bias is None else bias.clone()


class LibraryLayer(nn.Module):
    """A recipe as the library computes it.

    Args:
        recipe: the layer and what is fused into it.
        channels_last: let the library work with the channels last in memory.
    """

    weight: Tensor
    bias: Tensor | None
    ends: Tensor | None

    def __init__(self, recipe: Recipe, *, channels_last: bool = False) -> None:
        """Make the weights; nothing is shared with the recipe."""
        super().__init__()
        layer: Any = recipe.layer
        weight, bias = recipe.weight_and_bias()
        memory = torch.channels_last if channels_last else torch.contiguous_format
        self.register_buffer("weight", weight.contiguous(memory_format=memory))
        self.register_buffer("bias", bias)
        self.register_buffer("ends", recipe.ends)
        self.path, self.activation, self.channels_last = recipe.path, recipe.activation, channels_last
        self.pads: tuple[int, ...] = ()
        if weight.dim() > 2:
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
            self.groups, self.mode = conv_groups(layer), layer.padding_mode
            if self.mode != "zeros":
                self.pads = tuple(padding_list(layer))
                self.padding = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer and what was fused into it; the result is a new tensor."""
        y = self._layer(x if self.ends is None else keep_between(x, self.ends))
        if residual is not None:
            y = y.add_(residual)
        return activate(self.activation, y)

    def _layer(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.pads:
            x = F.pad(x, self.pads, mode=self.mode)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.weight.dim() - 3]
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.path}, activation={self.activation!r}, channels_last={self.channels_last}"


def keep_between(x: Tensor, ends: Tensor) -> Tensor:
    """Compute ``min(max(x, low), high)`` with the `ends` ``[C, 2]`` of each channel of x ``[N, C, …]``."""
    low, high = ends.view(1, -1, *[1] * (x.dim() - 2), 2).unbind(-1)
    y = torch.maximum(x, low)
    return torch.minimum(y, high, out=y)


class FusedNorm(nn.Module):
    """A norm that no layer stands before: ``activation(scale · x + shift)``."""

    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor
    activation: str | None

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        """Take a batch norm in eval mode, and the type to compute in."""
        super().__init__()
        scale, shift = scale_and_shift(norm)
        self.register_buffer("mean", torch.zeros_like(scale, dtype=dtype))
        self.register_buffer("var", torch.ones_like(scale, dtype=dtype))
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("shift", shift.to(dtype))
        self.activation = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the norm and what was fused into it; the result is a new tensor."""
        y = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=0.0)
        return activate(self.activation, y)


class LastPool(nn.Module):
    """A two-dimensional pooling done with the channels last in memory, where the library is many times faster at it.

    A large batch is done in parts, so that the reordered tensor stays in the caches.
    """

    PART = 4 * 2**20  # numbers

    def __init__(self, pool: nn.Module) -> None:
        """Take the pooling module."""
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Pool; the result is contiguous."""
        images = max(1, self.PART * len(x) // max(x.numel(), 1))
        parts = [self.pool(part.contiguous(memory_format=torch.channels_last)) for part in torch.split(x, images)]
        return torch.cat([part.contiguous() for part in parts]) if len(parts) > 1 else parts[0].contiguous()


def call_name(path: str, known: Collection[str]) -> str:
    """A layer's path, or, for further calls of it than those that are `known`, its path with a number."""
    calls = sum(name.partition("#")[0] == path for name in known)
    return path if not calls else f"{path}#{calls + 1}"
