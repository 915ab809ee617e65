"""`open_data`: a data set by its folder or name, with what is known about it."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from passes.errors import InputError
from sgfx.data.folders import is_cub, read_cub, read_folder
from sgfx.data.images import Images, Pixels, images_of
from sgfx.data.normalization import NORMALIZATIONS, Normalization

MADE = ("digits", "synthetic")
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # and the folders that torchvision makes
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: what it is, for messages.
        classes: their names, in the order of their numbers.
        train: training images, or None where there are none.
        val: validation (or test) images.
        normalization: what is usual for it.
        mirrored: whether an image and its mirror image mean the same.
    """

    name: str
    classes: tuple[str, ...]
    train: Images | None
    val: Images
    normalization: Normalization
    mirrored: bool = True


def open_data(given: str, *, download: str | None = None, size: int | None = None) -> Source:
    """Find out what a data set is, and read it if its images are small.

    Args:
        given: a folder (see `sgfx.data.folders`; or with CIFAR-10 or -100 as torchvision keeps it), ``"digits"``
            (scikit-learn's) or ``"synthetic"`` (256 images in four colours, made for trials).
        download: ``"cifar10"`` or ``"cifar100"``, to be fetched into the folder unless it is there; nothing is ever
            fetched otherwise.
        size: pixels a side of small images; None: as they are (digits and synthetic images: 32).

    Raises:
        InputError: there is no such folder, or it has no images in a layout that is known.
    """
    if given in MADE:
        return _digits(size or 32) if given == "digits" else _synthetic(size or 32)
    folder = Path(given)
    if download is not None:
        return _cifar(download, folder, fetch=True, size=size)
    if not folder.is_dir():
        what = "is a file: unpack it, and give the folder" if folder.exists() else "does not exist"
        raise InputError(f"data: {folder} {what} (data are a folder, or one of {', '.join(MADE)})")
    for name, inside in CIFAR.items():
        if (folder / inside).is_dir() or folder.name == inside:
            return _cifar(name, folder.parent if folder.name == inside else folder, fetch=False, size=size)
    classes, train, val = read_cub(folder) if is_cub(folder) else read_folder(folder)
    usual = NORMALIZATIONS["cifar10" if classes == _CIFAR10 else "imagenet"]
    return Source(
        str(folder),
        classes,
        None if train is None else images_of(train, f"{folder} (training)", size),
        images_of(val, f"{folder} (validation)", size),
        usual,
    )


def _cifar(name: str, folder: Path, *, fetch: bool, size: int | None) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100

    if name not in CIFAR:
        raise InputError(f"only {' and '.join(CIFAR)} can be downloaded, not {name!r}")
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Files already downloaded and verified"
            parts = [kind(folder, train=train, download=fetch) for train in (True, False)]
    except RuntimeError as error:
        raise InputError(f"{folder} does not hold {name} whole ({error}); download={name} fetches it") from error
    train, val = (
        Pixels(_scaled(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), size), torch.tensor(part.targets))
        for part in parts
    )
    return Source(name, tuple(parts[0].classes), train, val, NORMALIZATIONS[name])


def _digits(size: int) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images * (255 / 16), dtype=torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    parts = train_test_split(
        _scaled(pixels, size), torch.tensor(labels), test_size=0.2, random_state=0, stratify=labels
    )
    names = tuple(map(str, range(10)))
    train, val = Pixels(parts[0], parts[2]), Pixels(parts[1], parts[3])
    return Source("digits", names, train, val, NORMALIZATIONS["half"], mirrored=False)


def _synthetic(size: int) -> Source:
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])

    def part(count: int) -> Pixels:
        targets = torch.arange(count) % len(colours)
        noise = torch.randint(-50, 51, (count, 3, size, size), generator=generator)
        return Pixels((colours[targets][:, :, None, None] + noise).to(torch.uint8), targets)

    names = ("red", "green", "blue", "yellow")
    return Source("synthetic", names, part(192), part(64), NORMALIZATIONS["half"])


def _scaled(images: Tensor, size: int | None) -> Tensor:
    from torchvision.transforms.v2 import functional as v2

    if size is None or images.shape[-2:] == (size, size):
        return images
    scaled: Tensor = v2.resize(images, [size, size], antialias=True)
    return scaled
