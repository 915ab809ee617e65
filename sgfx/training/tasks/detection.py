"""Detection: lists of images and their boxes, the losses of torchvision's detectors, mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from sgfx.training.tasks.precision import PrecisionMeter
from sgfx.training.tasks.task import Call, Lesson, Meter, Task

Images: TypeAlias = list[Tensor]
Targets: TypeAlias = list[dict[str, Any]]
# Where torchvision's detectors keep how many classes they tell apart, and the least label that is no background.
CLASSES = (
    ("roi_heads.box_predictor.cls_score.out_features", 1),
    ("head.classification_head.num_classes", 0),  # RetinaNet, FCOS
    ("head.classification_head.num_columns", 1),  # SSD
)


class Detection(Task):
    """Batches are ``(images, targets)``, one target for each image.

    Images are ``[C, H, W]``, of any sizes, in [0, 1]; a target is a dict of ``boxes`` ``[N, 4]``, ``x1, y1, x2, y2`` in
    pixels, and ``labels`` ``[N]``, int64, and whatever else the detector reads. In train mode the model takes both and
    gives a dict of losses, in eval mode it takes the images and gives a dict of boxes, labels and scores for each.
    """

    best = "map"
    gathers_objects = True

    def read(self, batch: Any, name: str, place: str) -> tuple[Images, Targets]:
        """See `Task`."""
        images, targets = batch if isinstance(batch, tuple | list) and len(batch) == 2 else ((), ())
        if not _are_images(images) or not isinstance(targets, tuple | list) or len(targets) != len(images):
            raise InputError(
                f"{name} must give batches (images, targets): a list of tensors [C, H, W] and a list of as many dicts "
                f"with boxes and labels; {place} is something else: give the DataLoader "
                "collate_fn=sgfx.data.detection.collate"
            )
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            _check(image, target, f"image {number} in {place} of {name}")
        return list(images), list(targets)

    def lesson(self, model: nn.Module, call: Call, inputs: Images, targets: Targets) -> Lesson:
        """See `Task`."""
        _check_labels(model, targets)
        losses = call(inputs, targets)
        if not isinstance(losses, Mapping) or not losses or not all(map(_is_loss, losses.values())):
            given = sorted(losses) if isinstance(losses, Mapping) else type(losses).__name__
            raise InputError(
                f"in train mode a detector must give a dict of losses, each one number that has a gradient, and "
                f"{type(model).__name__} gave {given}"
            )
        return Lesson(None, dict(losses), len(inputs))

    def outputs(self, call: Call, inputs: Images, targets: Targets) -> list[dict[str, Tensor]]:
        """For each image ``boxes``, ``labels`` and ``scores``."""
        found = call(inputs)
        if not isinstance(found, Sequence) or len(found) != len(inputs) or not all(map(_are_boxes, found)):
            raise InputError(
                "in eval mode a detector must give a dict of boxes, labels and scores for each image, and this one "
                f"gave {type(found).__name__} for {len(inputs)} images"
            )
        return list(found)

    def meter(self) -> Meter:
        """Mean average precision."""
        return PrecisionMeter()

    def rehearse(self, model: nn.Module, call: Call, inputs: Images) -> None:
        """Refuse a model that takes no list of images, or doesn't give boxes."""
        try:
            self.outputs(call, inputs, [])
        except (TypeError, AttributeError, ValueError, RuntimeError) as error:  # code of others
            let_memory_errors_pass(error)
            raise InputError(
                f"task='detection' is of models that take a list of images and give boxes, as torchvision's detectors "
                f"do; {type(model).__name__} does not: {error}"
            ) from error


def class_labels(detector: nn.Module) -> range | None:
    """The labels that a detector of torchvision can learn, or None where that isn't known."""
    for path, first in CLASSES:
        try:
            return range(first, int(attrgetter(path)(detector)))
        except AttributeError:
            continue
    return None


def _check(image: Tensor, target: Any, where: str) -> None:
    """Refuse an image or a target of another form."""
    if not image.is_floating_point():
        raise InputError(
            f"{where} is {image.dtype}, and must be numbers in [0, 1]: v2.ToDtype(torch.float32, scale=True) makes them"
        )
    if not isinstance(target, Mapping) or not all(isinstance(target.get(key), Tensor) for key in ("boxes", "labels")):
        raise InputError(f"the target of {where} must be a dict with the tensors 'boxes' and 'labels'")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise InputError(
            f"boxes [N, 4] and labels [N] are needed for {where}, and are {list(boxes.shape)} and {list(labels.shape)}:"
            " without boxes, give torch.zeros(0, 4) and no labels"
        )
    if labels.dtype != torch.int64 or not boxes.is_floating_point():
        raise InputError(
            f"boxes must be floating-point numbers and labels int64 for {where}, not {boxes.dtype} and {labels.dtype}"
        )
    wrong = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & torch.isfinite(boxes).all(1))
    if wrong.any():
        raise InputError(
            f"boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2, and {boxes[wrong][0].tolist()} is one for {where}: "
            "filter them, as sgfx.data.detection does"
        )


def _check_labels(model: nn.Module, targets: Targets) -> None:
    known = class_labels(model)
    if known is None:
        return
    for target in targets:
        labels = target["labels"]
        if len(labels) and not (known.start <= int(labels.min()) and int(labels.max()) < known.stop):
            raise InputError(
                f"labels go from {int(labels.min())} to {int(labels.max())}, and {type(model).__name__} knows "
                f"{known.start} to {known.stop - 1}: make it for as many classes as the data have, and the background "
                f"(num_classes={int(labels.max()) + 1})"
            )


def _are_images(images: Any) -> bool:
    several = isinstance(images, tuple | list) and len(images) > 0
    return several and all(isinstance(image, Tensor) and image.dim() == 3 for image in images)


def _is_loss(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad >= torch.is_grad_enabled()


def _are_boxes(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(found.get(k), Tensor) for k in ("boxes", "labels", "scores"))
