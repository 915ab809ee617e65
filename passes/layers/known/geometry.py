"""How a layer reads its input: over how many dimensions it moves, what it pads, how large its result is.

For dense, masked and grouped convolutions and linear layers. A linear layer moves over none, and reads the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.layers.grouped import Grouped, GroupedLinear


def is_layer(module: nn.Module | None) -> bool:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear | Grouped)


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer."""
    return isinstance(module, nn.Linear | GroupedLinear)


def spatial_dims(layer: Any) -> int:
    """Number of dimensions behind the channels that a layer moves over: 1 to 3, and 0 of a linear layer."""
    return 0 if is_linear(layer) else len(layer.kernel_size)


def conv_groups(layer: Any) -> int:
    """The argument ``groups`` of a convolution; 1 of all other layers."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def paddings(layer: Any) -> list[tuple[int, int]]:
    """Pixels that a convolution adds before and behind each dimension; ``"same"`` puts the odd one behind."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        reach = [(size - 1) * far for size, far in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(each // 2, each - each // 2) for each in reach]
    return [(amount, amount) for amount in layer.padding]


def padding_list(layer: Any) -> list[int]:
    """The paddings of a convolution as ``torch.nn.functional.pad`` takes them, the last dimension first."""
    return list(chain.from_iterable(reversed(paddings(layer))))


def output_sizes(layer: Any, sizes: Sequence[int]) -> list[int]:
    """The sizes, dimension by dimension, of what a convolution makes of an input of these `sizes`."""
    geometry = zip(sizes, layer.kernel_size, layer.stride, layer.dilation, paddings(layer), strict=True)
    return [
        (size + before + behind - far * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, far, (before, behind) in geometry
    ]
