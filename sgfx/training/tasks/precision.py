"""Mean average precision of boxes, as COCO defines it and faster-coco-eval computes it.

torchmetrics, which can ask it too, gives it thresholds in single precision: an overlap of exactly 0.6 is none there,
and results differ in the third digit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from passes.errors import InputError
from sgfx.training.tasks.task import Meter

Boxes: TypeAlias = dict[str, Any]  # of one image: "boxes" [N, 4] as x1, y1, x2, y2, "labels" [N], and more
FOUND, TRUE = ("boxes", "scores", "labels"), ("boxes", "labels", "iscrowd", "area")
OPTIONAL = {"scores": "score", "iscrowd": "iscrowd", "area": "area"}  # and what COCO calls them
PACKAGE = "faster-coco-eval"


class PrecisionMeter(Meter):
    """Keeps what was found in each image and what is there, until all of them are known."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._images: list[dict[str, dict[str, Tensor]]] = []

    def update(self, outputs: Sequence[Boxes] | None, targets: Sequence[Boxes]) -> None:
        """Take in a batch; a detector that trains finds nothing, it gives losses alone."""
        for found, true in zip(outputs, targets, strict=True) if outputs is not None else ():
            kept = {"found": _tensors(found, FOUND), "true": _tensors(true, TRUE)}
            self._images.append(kept)

    def state(self) -> dict[str, Any]:
        """``{"images": [{"found": …, "true": …}, …]}``, tensors on the CPU."""
        return {"images": self._images}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Meter`."""
        self._images = list(state["images"])

    @staticmethod
    def results(states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``map``, over IoU thresholds from 0.5 to 0.95, ``map50`` and ``map75``: shares in [0, 1]."""
        return average_precision([image for state in states for image in state["images"]])[0]


def average_precision(images: Sequence[Mapping[str, Boxes]]) -> tuple[dict[str, float], dict[int, float]]:
    """What `PrecisionMeter` measures, and the average precision of each label.

    Args:
        images: of each image what was ``"found"`` (boxes, scores, labels) and what is ``"true"`` (boxes and labels; an
            ``iscrowd`` of 1 says that a box counts neither way, ``area`` what is in the box).

    Returns:
        ``{"map": …, "map50": …, "map75": …}``, and the precision of each label that has boxes; both are empty where
        nothing was measured.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    check_installed()
    if not any(len(image["true"]["boxes"]) for image in images):
        return {}, {}
    import numpy as np
    from faster_coco_eval import COCO, COCOeval_faster

    labels = sorted({label for image in images for part in image.values() for label in part["labels"].tolist()})
    content = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": label} for label in labels],
    }
    true, found = (COCO({**content, "annotations": list(_entries(images, part))}) for part in ("true", "found"))
    evaluation = COCOeval_faster(true, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, labels]: all sizes, 100 boxes
    known = precision.max((0, 1)) >= 0  # labels that have boxes
    means = precision[:, :, known].mean((1, 2))
    thresholds = evaluation.params.iouThrs
    at = {"map50": 0.5, "map75": 0.75}
    total = {"map": float(means.mean())} | {k: float(means[np.isclose(thresholds, x)][0]) for k, x in at.items()}
    by_label = precision.mean((0, 1))
    return total, {label: float(by_label[i]) for i, label in enumerate(labels) if known[i]}


def _entries(images: Sequence[Mapping[str, Boxes]], part: str) -> Iterator[dict[str, Any]]:
    """The boxes of one part as COCO writes them."""
    number = 0
    for place, image in enumerate(images):
        boxes = {name: values.tolist() for name, values in _tensors(image[part], (*FOUND, *TRUE)).items()}
        for row, (x1, y1, x2, y2) in enumerate(boxes["boxes"]):
            number += 1
            entry = {"id": number, "image_id": place, "category_id": boxes["labels"][row], "iscrowd": 0}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            yield entry | {key: boxes[name][row] for name, key in OPTIONAL.items() if name in boxes}


def check_installed() -> None:
    """Refuse to measure without the package that does.

    Raises:
        InputError: it is not there.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise InputError(f"mean average precision needs {PACKAGE}: pip install 'sgfx[detection]'")


def _tensors(boxes: Boxes, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: boxes[name].detach().cpu() for name in names if isinstance(boxes.get(name), Tensor)}
