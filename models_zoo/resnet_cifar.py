"""ResNet-20 to ResNet-110 for CIFAR (He et al. 2015, section 4.2), with the parameter-free shortcuts of option A.

Three stages of n basic blocks with 16, 32 and 64 channels; depth = 6·n + 2. Module names are those of the published
checkpoints: ``conv1``, ``bn1``, ``layer{1,2,3}.N.{conv1,bn1,conv2,bn2}``, ``linear``.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models_zoo.registry import check_count, register


class OptionAShortcut(nn.Module):
    """Every second pixel of each row and column; the new channels are zeros, half of them before the old ones."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Note how many zero channels go before and after."""
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, ⌈H/2⌉, ⌈W/2⌉]``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; a block that widens also halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build the block; the stride is 2 where the channels change."""
        super().__init__()
        widens = in_channels != out_channels
        stride = 2 if widens else 1
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = OptionAShortcut(in_channels, out_channels) if widens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNetCifar(nn.Module):
    """He's ResNet for images ``[N, in_channels, 32, 32]``."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        """Build the network with random weights.

        Args:
            depth: number of layers with weights, 6·n + 2.
            num_classes: number of class scores.
            in_channels: channels of the input images.

        Raises:
            ValueError: if an option is not a whole number of at least 1.
        """
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, num_classes]`` of images ``[N, in_channels, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, out_channels), *rest)


for _depth in (20, 32, 44, 56, 110):
    register(f"resnet{_depth}")(partial(ResNetCifar, _depth))
