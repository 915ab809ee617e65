"""Images with boxes, in COCO's format: torchvision's CocoDetection, whose boxes move with the images.

A folder is known by one of these, with ``val``, ``valid`` or ``test`` for the images to validate on:

- ``train.json`` and ``val.json``, images in ``images/``, or in ``train/`` and ``val/``;
- ``annotations/instances_train2017.json`` and ``instances_val2017.json``, images in ``train2017/`` and ``val2017/``;
- ``_annotations.coco.json`` in ``train/`` and ``valid/``, beside the images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, wrap

from passes.errors import InputError
from sgfx.data.annotations import Annotations, Box, read_annotations
from sgfx.data.unreadable import read_image

VALIDATION = ("val", "valid", "test")
LAYOUTS = (  # of annotations, and of images
    ("{}.json", "images"),
    ("{}.json", "{}"),
    ("annotations/instances_{}2017.json", "{}2017"),
    ("{}/_annotations.coco.json", "{}"),
)
KEYS = {"image_id", "boxes", "labels", "iscrowd", "area"}
Target: TypeAlias = dict[str, Any]
Example: TypeAlias = tuple[Tensor, Target]
Batch: TypeAlias = tuple[list[Tensor], list[Target]]


@dataclass(frozen=True)
class Detections:
    """A data set of images with boxes.

    Attributes:
        name: what it is, for messages.
        classes: names of the labels 1, 2, …; 0 is the background.
        train: what the training annotations say, or None where there are none.
        val: the same for validation.
    """

    name: str
    classes: tuple[str, ...]
    train: Annotations | None
    val: Annotations


def open_detection(given: str | os.PathLike[str]) -> Detections:
    """Find and read the annotations in a folder; a warning says how many boxes were left out.

    Raises:
        InputError: the layout is none of those of this module, a file is damaged, or the parts have other classes.
    """
    folder = Path(given)
    if not folder.is_dir():
        what = "is a file: unpack it, and give the folder" if folder.exists() else "does not exist"
        raise InputError(f"data: {folder} {what}")
    train = _part(folder, "train")
    val = next(filter(None, (_part(folder, name) for name in VALIDATION)), None)
    if val is None:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise InputError(
            f"{folder} has no annotations in COCO's format to validate on (it holds {inside}): expected val.json and "
            "images/, annotations/instances_val2017.json and val2017/, or valid/_annotations.coco.json"
        )
    if train is not None and train.classes != val.classes:
        raise InputError(
            f"{train.file} has the categories {', '.join(train.classes)}, and {val.file} has {', '.join(val.classes)}: "
            "both must list the same, in the order of their ids"
        )
    for part in (train, val):
        if part is not None and part.filtered:
            warnings.warn(
                f"{part.filtered} boxes of {part.file} lie outside their images, or have no area, and were left out",
                stacklevel=2,
            )
    return Detections(str(folder), val.classes, train, val)


def _part(folder: Path, name: str) -> Annotations | None:
    for listed, images in LAYOUTS:
        file, inside = folder / listed.format(name), folder / images.format(name)
        if file.is_file() and inside.is_dir():
            return read_annotations(file, inside)
    return None


class CocoImages(CocoDetection):  # type: ignore[misc]  # torchvision has no types
    """Images and boxes of a file that was checked.

    Args:
        annotations: what the file says.
        transforms: called with image and boxes, as `wrap_dataset_for_transforms_v2` does.
    """

    def __init__(self, annotations: Annotations, transforms: Callable[..., Any] | None = None) -> None:
        """Note them; nothing is read yet."""
        VisionDataset.__init__(self, annotations.folder, transforms)  # CocoDetection's own needs pycocotools
        self.annotations, self.ids = annotations, sorted(annotations.images)

    def _load_image(self, id: int) -> Image.Image:  # noqa: A002 - as in CocoDetection
        name, width, height = self.annotations.images[id]
        path = self.annotations.folder / name
        image = read_image(str(path))
        if image is None:
            raise InputError(f"{path} can't be read, or is no image: bring it back, or take it out of the annotations")
        if image.size != (width, height):
            raise InputError(
                f"{path} has {image.size[0]}×{image.size[1]} pixels, and {self.annotations.file} says {width}×{height}:"
                " its boxes would lie elsewhere"
            )
        return image

    def _load_target(self, id: int) -> list[Box]:  # noqa: A002
        return self.annotations.boxes[id]


def examples(annotations: Annotations, *, train: bool) -> Dataset[Example]:
    """Images ``[3, H, W]`` in [0, 1] and their targets, one by one.

    A target has ``boxes`` ``[N, 4]`` as ``x1, y1, x2, y2``, ``labels``, ``iscrowd`` and ``area`` ``[N]``, and
    ``image_id``.

    Args:
        annotations: what there is.
        train: whether images are mirrored at random, and boxes around crowds left out.
    """
    steps = [_complete, *([_without_crowds, v2.RandomHorizontalFlip()] if train else [])]
    transforms = v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), _plain])
    wrapped: Dataset[Example] = wrap_dataset_for_transforms_v2(CocoImages(annotations, transforms), target_keys=KEYS)
    return wrapped


class DetectionLoaders:
    """Batches of images with boxes: lists of images of different sizes, and of their targets.

    Args:
        source: the data set.
        batch_size: images of a step, over all processes.
        workers: processes that read.

    Attributes:
        augmentation: what the trainer does with a batch: nothing, images are mirrored as they are read.
        classes: names of the labels 1, 2, …

    Raises:
        InputError: a batch can't be divided among the processes.
    """

    augmentation = None

    def __init__(self, source: Detections, *, batch_size: int = 4, workers: int = 0) -> None:
        """Note them."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if batch_size < 1 or batch_size % processes:
            raise InputError(f"batch_size={batch_size} can't be divided among {processes} processes")
        self._source, self._share, self._workers = source, batch_size // processes, workers
        self.classes = source.classes

    @property
    def train(self) -> DataLoader[Example]:
        """Training images, in an order that changes from epoch to epoch.

        Raises:
            InputError: there are none.
        """
        return self._loader(examples(self._training(), train=True), shuffle=True)

    @property
    def val(self) -> DataLoader[Example]:
        """Validation images."""
        return self._loader(examples(self._source.val, train=False))

    @property
    def example(self) -> Batch:
        """Two validation images and their targets."""
        found = examples(self._source.val, train=False)
        return collate([found[number] for number in range(min(2, len(self._source.val.images)))])

    def unlabelled(self, count: int) -> list[list[Tensor]]:
        """Training images without boxes, as they are: always the same, in batches.

        Raises:
            InputError: there are not as many.
        """
        total = len(self._training().images)
        if not 1 <= count <= total:
            raise InputError(f"{self._source.name} has {total} training images: {count} can't be taken")
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist()
        return [images for images, _ in self._loader(Subset(examples(self._training(), train=False), chosen))]

    def report_unreadable(self) -> None:
        """There are none: an image that can't be read is an error, as what is measured would not be right."""

    def _training(self) -> Annotations:
        if self._source.train is None:
            raise InputError(f"{self._source.name} has no training images: expected train.json beside val.json")
        return self._source.train

    def _loader(self, dataset: Dataset[Example], *, shuffle: bool = False) -> DataLoader[Example]:
        return DataLoader(
            dataset,
            batch_size=self._share,
            shuffle=shuffle,
            num_workers=self._workers,
            collate_fn=collate,
            pin_memory=torch.accelerator.is_available(),
        )


def collate(batch: Sequence[Example]) -> Batch:
    """A list of images, which may be of different sizes, and a list of their targets."""
    return [image for image, _ in batch], [target for _, target in batch]


def _complete(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """All entries of a target as tensors; the wrapper gives none to an image without boxes."""
    size = (image.size[1], image.size[0])
    none = BoundingBoxes(torch.zeros(0, 4), format=BoundingBoxFormat.XYXY, canvas_size=size)
    return image, {
        "boxes": target.get("boxes", none),
        "labels": torch.as_tensor(target.get("labels", []), dtype=torch.int64),
        "iscrowd": torch.as_tensor(target.get("iscrowd", []), dtype=torch.int64),
        "area": torch.as_tensor(target.get("area", []), dtype=torch.float32),
        "image_id": target["image_id"],
    }


def _without_crowds(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    keep = target["iscrowd"] == 0
    boxes = wrap(target["boxes"][keep], like=target["boxes"])
    return image, {**target, "boxes": boxes, **{name: target[name][keep] for name in ("labels", "iscrowd", "area")}}


def _plain(image: Tensor, target: Target) -> Example:
    """Plain tensors: detectors are given no others."""
    return image.as_subclass(Tensor), {**target, "boxes": target["boxes"].as_subclass(Tensor).float()}
