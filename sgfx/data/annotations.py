"""Boxes of images in COCO's format, checked and filtered before the first image is read.

Labels are 1, 2, … in the order of the categories' ids, whatever holes these have. Boxes are clipped to their image; one
that lies outside, or has no area, is left out and counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.errors import InputError

LEAST = 0.1  # pixels a side: a box that is narrower has no area
PARTS = ("images", "annotations", "categories")
Box = dict[str, Any]  # as CocoDetection gives it: "bbox" [x, y, width, height], "category_id", "iscrowd", "area"


@dataclass(frozen=True)
class Annotations:
    """What an annotation file says.

    Attributes:
        file: it.
        folder: of the images.
        classes: names of the labels 1, 2, …
        images: name, width and height of each image, by its id.
        boxes: of each image, by its id; ``category_id`` is the label.
        filtered: how many boxes were left out.
    """

    file: Path
    folder: Path
    classes: tuple[str, ...]
    images: Mapping[int, tuple[str, int, int]]
    boxes: Mapping[int, list[Box]]
    filtered: int


def read_annotations(file: Path, folder: Path) -> Annotations:
    """Read and check an annotation file.

    Args:
        file: JSON in COCO's format.
        folder: that its images are in.

    Raises:
        InputError: it is damaged, of another format, contradicts itself, has no boxes, or names images that are not
            there.
    """
    content = _parsed(file)
    images = _images(content["images"], file, folder)
    names = _by_id(content["categories"], "categories", file)
    order = sorted(names)
    labels = {number: place for place, number in enumerate(order, 1)}
    boxes: dict[int, list[Box]] = {number: [] for number in images}
    filtered = 0
    for each in content["annotations"]:
        number, category = (_field(each, name, "annotations", file) for name in ("image_id", "category_id"))
        if number not in images or category not in labels:
            what = f"image {number}" if number not in images else f"category {category}"
            raise InputError(f"{file} has a box of {what}, which is not in its lists of images and categories")
        clipped = _clipped(each, images[number], file)
        if clipped is None:
            filtered += 1
            continue
        area = each.get("area") or clipped[2] * clipped[3]
        crowd = int(each.get("iscrowd", 0))
        boxes[number].append({"bbox": clipped, "category_id": labels[category], "iscrowd": crowd, "area": float(area)})
    if not any(boxes.values()):
        raise InputError(f"{file} has no boxes for its {len(images)} images: nothing can be learnt or measured from it")
    classes = tuple(str(_field(names[number], "name", "categories", file)) for number in order)
    return Annotations(file, folder, classes, images, boxes, filtered)


def _parsed(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or UTF-8
        raise InputError(f"{file} is no JSON file, or a damaged one: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
        raise InputError(f"{file} is not in COCO's format: it must be an object with the lists {', '.join(PARTS)}")
    return content


def _field(entry: Any, name: str, part: str, file: Path) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise InputError(f"{file}: every entry of {part} must have {name!r}, and this one has not: {str(entry)[:80]}")
    return entry[name]


def _by_id(entries: Iterable[Any], part: str, file: Path) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for entry in entries:
        number = _field(entry, "id", part, file)
        if not isinstance(number, int) or number in found:
            raise InputError(f"{file}: ids of {part} must be whole numbers, each of one entry alone, not {number!r}")
        found[number] = entry
    if not found:
        raise InputError(f"{file} has no {part}")
    return found


def _images(entries: list[Any], file: Path, folder: Path) -> dict[int, tuple[str, int, int]]:
    images = {
        number: tuple(_field(entry, name, "images", file) for name in ("file_name", "width", "height"))
        for number, entry in _by_id(entries, "images", file).items()
    }
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    missing = [name for name, _, _ in images.values() if str(Path(name)) not in there]
    if missing:
        raise InputError(
            f"{file} names {len(missing)} images of {len(images)} that are not in {folder}: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}"
        )
    return images


def _clipped(entry: dict[str, Any], image: tuple[str, int, int], file: Path) -> list[float] | None:
    """The part of a box ``[x, y, width, height]`` that is in its image, or None if there is none."""
    box = _field(entry, "bbox", "annotations", file)
    try:
        x, y, width, height = map(float, box)
        if not math.isfinite(x + y + width + height):
            raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: a bbox is four numbers [x, y, width, height], not {box} (of {image[0]})") from error
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + width, float(image[1])), min(y + height, float(image[2]))
    if right - left < LEAST or bottom - top < LEAST:
        return None
    return [left, top, right - left, bottom - top]
