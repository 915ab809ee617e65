"""Faster R-CNN of torchvision on a classifier's trunk, dense or compiled, with and without a feature pyramid.

The trunk is the classifier without what comes behind its last map, under the names that its layers had there. Sizes are
measured in strides: a map whose pixels stand for s pixels of the image gets anchors of 8·s, and images are resized in
proportion to the first map's s. For s = 4 both are torchvision's; networks for small images have finer maps.
"""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models_zoo import registry
from models_zoo.densenet_bc import DenseNetBC
from models_zoo.registry import check_count, check_options
from models_zoo.resnet_cifar import ResNetCifar

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

STRIDE, MIN_SIZE, MAX_SIZE = 4, 800, 1333  # torchvision's sizes, and the stride of the first map they are meant for
ASPECT_RATIOS = (0.5, 1.0, 2.0)
PROBE = 64  # pixels a side of the image that shows the strides


def faster_rcnn(
    backbone: str | nn.Module, *, num_classes: int, fpn: bool = True, channels: int = 256, **options: Any
) -> FasterRCNN:
    """Faster R-CNN on the trunk of a classifier; everything else has random weights.

    Args:
        backbone: a ResNet or DenseNet of torchvision or of the zoo, or the name of one, which then has random weights
            too. Its layers, compiled or not, become the detector's own, as ``detector.backbone.body``.
        num_classes: classes that the detector tells apart, the background (0) among them: one more than the data have.
        fpn: whether the heads read a feature pyramid over the maps of all stages, or the map of the last stage.
        channels: of the pyramid.
        **options: those of ``torchvision.models.detection.FasterRCNN``: ``min_size`` and ``max_size``, the pixels to
            which images are resized (800 and 1333, or 200 and 333 on networks of the CIFAR kind), ``image_mean``,
            ``image_std``, ``box_detections_per_img``, …

    Returns:
        A detector in training mode. It takes a list of images ``[3, H, W]`` in [0, 1], of any sizes. In training it
        takes targets too and gives losses, else it gives boxes, labels and scores for each image.

    Raises:
        ValueError: an unknown option, a value that an option can't have, or a backbone of another kind.

    >>> detector = faster_rcnn("resnet20", num_classes=3, channels=16)
    >>> detector.backbone.out_channels, detector.transform.min_size
    (16, (200,))
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    check_count("num_classes", num_classes)
    check_count("channels", channels)
    if num_classes == 1:
        raise ValueError("num_classes counts the background too: give one more than the data have, at least 2")
    check_options("faster_rcnn", options, _options(FasterRCNN))
    model = _named(backbone) if isinstance(backbone, str) else backbone
    trunk, taps = _trunk(model)
    maps = _maps(trunk, taps, len(options.get("image_mean") or (0, 0, 0)))
    strides, widths = [stride for stride, _ in maps], [width for _, width in maps]
    body: Any
    if fpn:
        body = BackboneWithFPN(trunk, {tap: str(i) for i, tap in enumerate(taps)}, widths, channels)
        sizes = [(8 * stride,) for stride in (*strides, 2 * strides[-1])]
    else:
        body = nn.Sequential(OrderedDict(body=trunk))
        body.out_channels = widths[-1]
        sizes = [tuple(strides[-1] * 2**power for power in range(5))]
    read = [str(i) for i in range(len(taps) if fpn else 1)]
    own: dict[str, Any] = {
        "min_size": MIN_SIZE * strides[0] // STRIDE,
        "max_size": MAX_SIZE * strides[0] // STRIDE,
        "rpn_anchor_generator": AnchorGenerator(tuple(sizes), (ASPECT_RATIOS,) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(read, output_size=7, sampling_ratio=2),
    }
    return FasterRCNN(body, num_classes, **{**own, **options}).train()


def _named(name: str) -> nn.Module:
    """The classifier of a name, with random weights; nothing is downloaded."""
    if name in registry.list():
        return registry.create(name)
    from torchvision import models

    if name not in models.list_models(module=models):
        near = difflib.get_close_matches(name, [*registry.list(), *models.list_models(module=models)])
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"neither the zoo nor torchvision has a classifier named {name!r}{meant}")
    made: nn.Module = models.get_model(name, weights=None)
    return made


def _trunk(model: nn.Module) -> tuple[nn.Sequential, list[str]]:
    """What comes before the head of a classifier, and which of its steps give the maps of the stages.

    A ReLU that is a function in the forward of the classifier is a step here.
    """
    from torchvision.models import DenseNet, ResNet

    steps = OrderedDict(model.named_children())
    head: tuple[str, ...]
    if isinstance(model, DenseNet):
        steps = OrderedDict(model.features.named_children(), relu5=nn.ReLU())
        return nn.Sequential(steps), ["denseblock1", "denseblock2", "denseblock3", "relu5"]
    if isinstance(model, ResNet):
        stages, head = ["layer1", "layer2", "layer3", "layer4"], ("avgpool", "fc")
    elif isinstance(model, ResNetCifar):
        stages, head = ["layer1", "layer2", "layer3"], ("linear",)
        steps = OrderedDict(conv1=model.conv1, bn1=model.bn1, relu=nn.ReLU()) | steps
    elif isinstance(model, DenseNetBC):
        stages, head = ["block1", "block2", "relu"], ("fc",)
        steps["relu"] = nn.ReLU()
    else:
        raise ValueError(
            f"backbone must be a ResNet or DenseNet of torchvision or of the zoo, compiled or not, and is "
            f"{type(model).__name__}: for others, give torchvision's FasterRCNN a module with out_channels"
        )
    return nn.Sequential(OrderedDict((name, step) for name, step in steps.items() if name not in head)), stages


def _maps(trunk: nn.Sequential, taps: list[str], in_channels: int) -> list[tuple[int, int]]:
    """Stride and channels of the map after each of `taps`; the trunk's modules keep their modes."""
    from torchvision.models._utils import IntermediateLayerGetter

    first: Any = trunk[0]
    if first.in_channels != in_channels:
        raise ValueError(
            f"the backbone takes images of {first.in_channels} channels, and the detector those of {in_channels}, as "
            "many as image_mean and image_std have"
        )
    modes = [(module, module.training) for module in trunk.modules()]
    with torch.no_grad():
        maps = IntermediateLayerGetter(trunk.eval(), {tap: tap for tap in taps})(
            torch.zeros(1, in_channels, PROBE, PROBE, dtype=first.weight.dtype, device=first.weight.device)
        )
    for module, mode in modes:
        module.training = mode
    return [(PROBE // maps[tap].shape[-1], maps[tap].shape[1]) for tap in taps]


def _options(detector: type) -> list[str]:
    """What torchvision's detector leaves open, resizing included; not what `faster_rcnn` gives it."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    names = {**inspect.signature(detector).parameters, **inspect.signature(GeneralizedRCNNTransform).parameters}
    return [name for name in names if name not in ("backbone", "num_classes", "kwargs")]
