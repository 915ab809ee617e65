"""The Params and FLOPs columns of the paper's Tables 1 to 6, and the networks that they are of.

Tables 5 and 6 are of networks that were transferred, and don't say what their head is: parameters are given as they
would be under each reading of it. What the paper counts there as FLOPs is the backbone at 224×224, whatever the size of
the images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Published = tuple[str, float, float, float, float]  # model, conv ratio, linear ratio, parameters, MACs


@dataclass(frozen=True)
class Reading:
    """How the layers behind the last map of a transferred network may have been counted.

    Attributes:
        name: in words.
        outputs: how many values linear layers give from the pooled map.
        pruned: whether they are compressed as linear layers are.
    """

    name: str
    outputs: int
    pruned: bool = False


@dataclass(frozen=True)
class Table:
    """One of the paper's tables: a network, how it is compressed, and what was published.

    Attributes:
        head: the classifier's last layer, where the table is of a network that was transferred and has another one.
        readings: what stands in its place, the most likely first.
    """

    number: int
    title: str
    model: str
    size: int
    groups: int
    rows: tuple[Published, ...]
    options: dict[str, int] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    head: str | None = None
    readings: tuple[Reading, ...] = ()


_TRAINED = (
    Table(
        1,
        "DenseNet-121 on CIFAR-10, 32×32, 8 groups",
        "densenet121_cifar",
        32,
        8,
        (
            ("Baseline", 0, 0, 6.89e6, 888.36e6),
            ("DenseNet (Conv75/FC75)", 0.75, 0.75, 1.71e6, 221.90e6),
            ("DenseNet (Conv80/FC80)", 0.80, 0.80, 1.37e6, 177.72e6),
            ("DenseNet (Conv85/FC85)", 0.85, 0.85, 1.03e6, 134.10e6),
            ("DenseNet (Conv90/FC90)", 0.90, 0.90, 0.68e6, 89.77e6),
            ("DenseNet (Conv95/FC95)", 0.95, 0.95, 0.34e6, 45.76e6),
        ),
    ),
    Table(
        2,
        "DenseNet-121 on CIFAR-100, 32×32, 8 groups",
        "densenet121_cifar",
        32,
        8,
        (
            ("Baseline", 0, 0, 6.99e6, 888.45e6),
            ("DenseNet (Conv70/FC70)", 0.70, 0.70, 2.10e6, 266.60e6),
            ("DenseNet (Conv75/FC75)", 0.75, 0.75, 1.75e6, 222.14e6),
            ("DenseNet (Conv80/FC80)", 0.80, 0.80, 1.40e6, 176.46e6),
            ("DenseNet (Conv85/FC85)", 0.85, 0.85, 1.06e6, 133.46e6),
            ("DenseNet (Conv90/FC90)", 0.90, 0.90, 0.71e6, 89.86e6),
            ("DenseNet (Conv95/FC95)", 0.95, 0.95, 0.36e6, 45.67e6),
        ),
        options={"num_classes": 100},
    ),
    Table(
        3,
        "ResNet-50 on ImageNet, 224×224, 16 groups, downsample convolutions dense",
        "resnet50",
        224,
        16,
        (
            ("Baseline", 0, 0, 25.55e6, 4.09e9),
            ("ResNet-G (Conv60/FC60)", 0.6, 0.6, 11.88e6, 1.91e9),
            ("ResNet-G (Conv70/FC60)", 0.7, 0.6, 9.83e6, 1.55e9),
            ("ResNet-G (Conv80/FC60)", 0.8, 0.6, 7.76e6, 1.20e9),
            ("ResNet-LG (Conv60/FC60)", 0.6, 0.6, 11.87e6, 1.91e9),
            ("ResNet-LG (Conv70/FC60)", 0.7, 0.6, 9.83e6, 1.56e9),
            ("ResNet-LG (Conv80/FC60)", 0.8, 0.6, 7.76e6, 1.20e9),
        ),
        ignore=("*.downsample",),
    ),
    Table(
        4,
        "DenseNet-201 on ImageNet, 224×224, 16 groups",
        "densenet201",
        224,
        16,
        (
            ("Baseline", 0, 0, 19.82e6, 4.29e9),
            ("DenseNet-G (Conv70/FC60)", 0.7, 0.6, 6.00e6, 1.34e9),
            ("DenseNet-G (Conv80/FC60)", 0.8, 0.6, 4.32e6, 0.99e9),
            ("DenseNet-LG (Conv70/FC60)", 0.7, 0.6, 6.00e6, 1.34e9),
            ("DenseNet-LG (Conv80/FC60)", 0.8, 0.6, 4.32e6, 0.99e9),
        ),
    ),
)

_RESNET: dict[str, Any] = {"model": "resnet50", "size": 224, "groups": 16, "ignore": ("*.downsample",), "head": "fc"}
_DENSENET: dict[str, Any] = {"model": "densenet201", "size": 224, "groups": 16, "head": "classifier"}
_BIRDS = (Reading("dense head, 200", 200), Reading("pruned head, 200", 200, True), Reading("head of ImageNet", 1000))
# A score for each class and four corrections of the box for each class; COCO's ids go to 90, and name 80 classes.
_BOXES = (
    Reading("dense heads, 91", 5 * 91),
    Reading("pruned heads, 91", 5 * 91, True),
    Reading("dense heads, 81", 5 * 81),
)
_TRANSFERRED = (
    Table(
        number=5,
        title="ResNet-50 on CUB-200, 16 groups, downsample convolutions dense; MACs of the backbone at 224×224",
        rows=(
            ("Baseline", 0, 0, 23.86e6, 4.09e9),
            ("ResNet-L (Conv60/FC60)", 0.6, 0.6, 11.46e6, 1.91e9),
            ("ResNet-L (Conv70/FC60)", 0.7, 0.6, 9.42e6, 1.56e9),
            ("ResNet-L (Conv80/FC60)", 0.8, 0.6, 7.35e6, 1.20e9),
            ("ResNet-G (Conv60/FC60)", 0.6, 0.6, 11.47e6, 1.91e9),
            ("ResNet-G (Conv70/FC60)", 0.7, 0.6, 9.42e6, 1.55e9),
            ("ResNet-G (Conv80/FC60)", 0.8, 0.6, 7.35e6, 1.20e9),
            ("ResNet-LG (Conv60/FC60)", 0.6, 0.6, 11.46e6, 1.91e9),
            ("ResNet-LG (Conv70/FC60)", 0.7, 0.6, 9.42e6, 1.56e9),
            ("ResNet-LG (Conv80/FC60)", 0.8, 0.6, 7.35e6, 1.20e9),
        ),
        readings=_BIRDS,
        **_RESNET,
    ),
    Table(
        number=6,
        title="Faster R-CNN on ResNet-50, COCO, 16 groups; MACs of the backbone at 224×224",
        rows=(
            ("Baseline", 0, 0, 24.44e6, 4.09e9),
            ("ResNet-G (Conv60/FC60)", 0.6, 0.6, 12.00e6, 1.91e9),
            ("ResNet-G (Conv70/FC60)", 0.7, 0.6, 9.95e6, 1.55e9),
            ("ResNet-G (Conv80/FC60)", 0.8, 0.6, 7.88e6, 1.20e9),
            ("ResNet-LG (Conv60/FC60)", 0.6, 0.6, 11.99e6, 1.91e9),
            ("ResNet-LG (Conv70/FC60)", 0.7, 0.6, 9.95e6, 1.56e9),
            ("ResNet-LG (Conv80/FC60)", 0.8, 0.6, 7.88e6, 1.20e9),
        ),
        readings=_BOXES,
        **_RESNET,
    ),
    Table(
        number=5,
        title="DenseNet-201 on CUB-200, 16 groups; MACs of the backbone at 224×224",
        rows=(
            ("Baseline", 0, 0, 18.28e6, 4.29e9),
            ("DenseNet-L (Conv70/FC60)", 0.7, 0.6, 5.61e6, 1.34e9),
            ("DenseNet-L (Conv80/FC60)", 0.8, 0.6, 3.93e6, 0.94e9),
            ("DenseNet-G (Conv70/FC60)", 0.7, 0.6, 5.66e6, 1.35e9),
            ("DenseNet-G (Conv80/FC60)", 0.8, 0.6, 3.94e6, 0.94e9),
            ("DenseNet-LG (Conv70/FC60)", 0.7, 0.6, 5.61e6, 1.34e9),
            ("DenseNet-LG (Conv80/FC60)", 0.8, 0.6, 3.93e6, 0.94e9),
        ),
        readings=_BIRDS,
        **_DENSENET,
    ),
    Table(
        number=6,
        title="Faster R-CNN on DenseNet-201, COCO, 16 groups; MACs of the backbone at 224×224",
        rows=(
            ("Baseline", 0, 0, 18.78e6, 4.29e9),
            ("DenseNet-G (Conv70/FC60)", 0.7, 0.6, 6.15e6, 1.35e9),
            ("DenseNet-G (Conv80/FC60)", 0.8, 0.6, 4.44e6, 0.94e9),
            ("DenseNet-LG (Conv70/FC60)", 0.7, 0.6, 6.11e6, 1.34e9),
            ("DenseNet-LG (Conv80/FC60)", 0.8, 0.6, 4.43e6, 0.94e9),
        ),
        readings=_BOXES,
        **_DENSENET,
    ),
)
TABLES = _TRAINED + _TRANSFERRED
