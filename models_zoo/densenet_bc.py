"""DenseNet-BC for CIFAR (Huang et al. 2016): bottlenecks of 4·growth channels, transitions that halve the channels.

Three blocks of n layers, each layer a 1×1 and a 3×3 convolution; depth = 6·n + 4. Module names are those of
published checkpoints: ``conv1``, ``block{1,2,3}.layer.N.{bn1,conv1,bn2,conv2}``, ``trans{1,2}.{bn1,conv1}``, ``bn1``,
``fc``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models_zoo.registry import check_count, register


class BottleneckLayer(nn.Module):
    """Adds `growth` channels to those it reads: norm, ReLU, 1×1 convolution, norm, ReLU, 3×3 convolution."""

    def __init__(self, in_channels: int, growth: int) -> None:
        """Build the layer."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, in_channels + growth, H, W]``, the new channels last."""
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        return torch.cat([x, new], 1)


class DenseBlock(nn.Module):
    """A chain of layers, each reading what all before it have made."""

    def __init__(self, layers: int, in_channels: int, growth: int) -> None:
        """Build the layers."""
        super().__init__()
        # A module of its own around the chain, because the checkpoints name the layers `block1.layer.0`.
        self.layer = nn.Sequential(*(BottleneckLayer(in_channels + i * growth, growth) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, in_channels + layers·growth, H, W]``."""
        y: Tensor = self.layer(x)
        return y


class Transition(nn.Module):
    """Between two blocks: norm, ReLU, a 1×1 convolution that changes the channels, and 2×2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build the transition."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, ⌊H/2⌋, ⌊W/2⌋]``."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


@register("densenet_bc")
class DenseNetBC(nn.Module):
    """DenseNet-BC for images ``[N, in_channels, 32, 32]``."""

    def __init__(self, depth: int = 100, growth: int = 12, num_classes: int = 10, in_channels: int = 3) -> None:
        """Build the network with random weights.

        Args:
            depth: number of layers with weights, 6·n + 4 with n of at least 1.
            growth: channels that each layer adds (the k of the paper); the first convolution has twice as many.
            num_classes: number of class scores.
            in_channels: channels of the input images.

        Raises:
            ValueError: if an option is not a whole number of at least 1, or no network has this depth.
        """
        check_count("growth", growth)
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        layers = _layers_of_a_block(depth)
        super().__init__()
        stem = 2 * growth
        first = stem + layers * growth
        second = first // 2 + layers * growth
        third = second // 2 + layers * growth
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.block1 = DenseBlock(layers, stem, growth)
        self.trans1 = Transition(first, first // 2)
        self.block2 = DenseBlock(layers, first // 2, growth)
        self.trans2 = Transition(second, second // 2)
        self.block3 = DenseBlock(layers, second // 2, growth)
        self.bn1 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, num_classes]`` of images ``[N, in_channels, H, W]``, H and W at least 4."""
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.trans2(self.block2(x))
        x = F.relu(self.bn1(self.block3(x)))
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def _layers_of_a_block(depth: int) -> int:
    check_count("depth", depth)
    layers, rest = divmod(depth - 4, 6)
    if layers < 1 or rest:
        below = max(layers, 1) * 6 + 4
        near = f"{below} or {below + 6}" if layers >= 1 else f"{below}"
        raise ValueError(
            f"depth must be 6·n + 4 with n of at least 1 (three blocks of n layers with two convolutions each), "
            f"given {depth}; the nearest is {near}"
        )
    return layers
