"""Image folders: ``train/`` and ``val/`` (or ``test/``) with a folder for each class, and the layout of CUB-200.

CUB-200 as it is published has ``images.txt``, ``image_class_labels.txt`` and ``train_test_split.txt``, with the images
in ``images/``; each line of the three is a number and what belongs to it.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from passes.errors import InputError
from sgfx.data.images import Labelled

VALIDATION = ("val", "test")
CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
Found = tuple[tuple[str, ...], list[Labelled] | None, list[Labelled]]  # classes, training and validation files


def is_cub(folder: Path) -> bool:
    """Whether the three lists are there."""
    return all((folder / name).is_file() for name in CUB)


def read_cub(folder: Path) -> Found:
    """CUB-200 in its own layout.

    Raises:
        InputError: the lists don't belong together, or name no files.
    """
    names, labels, in_train = (dict(_pairs(folder / name)) for name in CUB)
    if not names or not names.keys() == labels.keys() == in_train.keys():
        raise InputError(f"{folder}: {', '.join(CUB)} must have a line for each image, under the same numbers")
    classes = sorted({Path(name).parent.name for name in names.values()})
    parts: dict[str, list[Labelled]] = {"0": [], "1": []}
    for number, name in names.items():
        label = classes.index(Path(name).parent.name)
        parts["1" if in_train[number] == "1" else "0"].append((str(folder / "images" / name), label))
    if not parts["0"] or not parts["1"]:
        raise InputError(f"{folder / CUB[2]} must name training (1) and test images (0)")
    return tuple(classes), parts["1"], parts["0"]


def _pairs(path: Path) -> list[tuple[str, str]]:
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wrong := [line for line in lines if len(line) != 2]:
        raise InputError(f"{path}: a line must be a number and what belongs to it, not {' '.join(wrong[0])!r}")
    return [(number, value.strip()) for number, value in lines]


def read_folder(folder: Path) -> Found:
    """Folders of classes under ``val/`` or ``test/``, and under ``train/`` where it is there.

    Raises:
        InputError: a folder is missing or empty, or validation has classes that training doesn't.
    """
    val = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
    if val is None:
        raise InputError(f"{folder} has no folder val or test{_hint(folder)}")
    train = folder / "train"
    classes = _classes(train if train.is_dir() else val)
    if extra := sorted(set(_classes(val)) - set(classes)):
        raise InputError(f"{val} has classes that {train} does not: {', '.join(extra[:5])}")
    return classes, _files(train, classes) if train.is_dir() else None, _files(val, classes)


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(find_classes(str(folder))[0])
    except FileNotFoundError:
        raise InputError(f"{folder} must have a folder of images for each class, and has no folders") from None


def _files(folder: Path, classes: tuple[str, ...]) -> list[Labelled]:
    index = {name: place for place, name in enumerate(classes)}
    files: list[Labelled] = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise InputError(f"{folder} has no images in its folders (looked for {', '.join(IMG_EXTENSIONS)})")
    return files


def _hint(folder: Path) -> str:
    """What may have been meant."""
    inside = [each for each in folder.iterdir() if each.is_dir()]
    for each in inside:
        if any((each / name).is_dir() for name in VALIDATION):
            return f"; did you mean {each}?"
    names = ", ".join(sorted(each.name for each in inside)[:5]) or "none"
    return (
        f" (its folders: {names}): expected train/ and val/ or test/ with a folder of images for each class, the "
        "layout of CUB-200, or CIFAR-10 or -100 as torchvision keeps them"
    )
