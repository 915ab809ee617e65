"""Models built from torchvision's: its ResNet-50 and DenseNet-201, and DenseNet-121 changed for CIFAR.

torchvision is imported by the builders, so that `import models_zoo` stays light. Weights are never downloaded.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from models_zoo.registry import check_count, check_options, register


@register("densenet121_cifar")
def densenet121_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """torchvision's DenseNet-121 for images ``[N, in_channels, 32, 32]``: a 3×3 stem of stride 1, no pooling after it.

    Args:
        num_classes: number of class scores.
        in_channels: channels of the input images.

    Raises:
        ValueError: if an option is not a whole number of at least 1.
    """
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    from torchvision.models import densenet121

    model: nn.Module = densenet121(weights=None, num_classes=num_classes)
    features = model.get_submodule("features")
    stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)  # as torchvision does for the convolution that this one replaces
    features.conv0 = stem
    del features.pool0
    return model


@register("resnet50")
def resnet50(weights: None = None, **options: Any) -> nn.Module:
    """torchvision's ResNet-50 for images ``[N, 3, H, W]``, 1,000 classes unless told otherwise.

    Args:
        weights: None, the only choice: nothing is downloaded.
        **options: those of ``torchvision.models.ResNet`` that its ResNet-50 leaves open.

    Raises:
        ValueError: for weights, or for an option that torchvision does not have or can't use.
    """
    from torchvision.models import ResNet, resnet50

    _check("resnet50", ResNet, ("block", "layers"), weights, options)
    model: nn.Module = resnet50(weights=None, **options)
    return model


@register("densenet201")
def densenet201(weights: None = None, **options: Any) -> nn.Module:
    """torchvision's DenseNet-201 for images ``[N, 3, H, W]``, 1,000 classes unless told otherwise.

    Args:
        weights: None, the only choice: nothing is downloaded.
        **options: those of ``torchvision.models.DenseNet`` that its DenseNet-201 leaves open.

    Raises:
        ValueError: for weights, or for an option that torchvision does not have or can't use.
    """
    from torchvision.models import DenseNet, densenet201

    _check("densenet201", DenseNet, ("growth_rate", "block_config", "num_init_features"), weights, options)
    model: nn.Module = densenet201(weights=None, **options)
    return model


def _check(name: str, network: type, fixed: tuple[str, ...], weights: object, options: dict[str, Any]) -> None:
    """Refuse weights, and options that `network` does not have or that are `fixed` by the name of the model."""
    if weights is not None:
        raise ValueError(
            f"weights={weights!r}: nothing is downloaded. Create {name} without weights, "
            "then read a file with models_zoo.load_checkpoint(model, path)"
        )
    # Named one by one, because torchvision itself still takes `pretrained=True` and would download.
    check_options(name, options, inspect.signature(network).parameters.keys() - set(fixed))
    if "num_classes" in options:
        check_count("num_classes", options["num_classes"])
