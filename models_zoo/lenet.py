"""LeNet-5 (LeCun et al. 1998) as it is built today.

The classical sizes, for inputs of 32×32, but with ReLU for tanh, max pooling for trained averages, a linear last layer,
and every map of `conv2` reading every map of `conv1`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models_zoo.registry import check_count, register


@register("lenet5")
class LeNet5(nn.Module):
    """LeNet-5 for images ``[N, in_channels, 32, 32]``: the 28×28 images of MNIST need a border of 2 pixels."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        """Build the network with random weights.

        Args:
            num_classes: number of class scores.
            in_channels: channels of the input images.

        Raises:
            ValueError: if an option is not a whole number of at least 1.
        """
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, num_classes]`` of images ``[N, in_channels, 32, 32]``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        scores: Tensor = self.fc3(F.relu(self.fc2(x)))
        return scores
