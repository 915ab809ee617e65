"""Whole detectors of torchvision as ONNX files, which take one image of any size and give what is found in it.

How many boxes there are depends on the values, which torch.export refuses; torch.onnx records a run instead. That is
what torchvision's detectors are made for: while one is recorded, it computes sizes in the graph. The file is compared
with the detector at other sizes, so that a number which stayed fixed shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from sgfx.exporting.formats import OnnxOptions, Run, check_installed, opened, quiet, reason_of

OPSET = 17  # the recorder of torch.onnx writes at most 20, and is tested most at this


class OneImage(nn.Module):
    """A detector as a function of one image ``[channels, H, W]``: boxes, labels, scores and what else it finds."""

    def __init__(self, detector: nn.Module) -> None:
        """Wrap a detector."""
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Find things in one image; in the order of `names_of`."""
        return tuple(self.detector([image])[0].values())


def names_of(detector: nn.Module, image: Tensor) -> list[str]:
    """What a detector gives of each image: ``["boxes", "labels", "scores"]``, and more of some kinds."""
    return list(detector([image])[0])


def images_of(inputs: tuple[Any, ...]) -> list[Tensor]:
    """The images among the example inputs; targets are for training alone."""
    images = inputs[0] if inputs else None
    if not isinstance(images, list | tuple) or not images or not all(isinstance(x, Tensor) for x in images):
        raise InputError("example_inputs of a detector must begin with a list of images, such as ([image],)")
    return list(images)


def at_three_sizes(images: list[Tensor]) -> Iterator[Tensor]:
    """The images, and parts of the first: of two thirds of its height, and of its width."""
    yield from images
    height, width = images[0].shape[-2:]
    yield images[0][..., : max(1, 2 * height // 3), :]
    yield images[0][..., : max(1, 2 * width // 3)]


def write_detector(detector: OneImage, image: Tensor, names: list[str], file: Path, options: OnnxOptions) -> Run:
    """Write a detector as ONNX, and return what runs the file in ONNX Runtime.

    Raises:
        InputError: torch.onnx can't record it, or what it recorded can't be run.
    """
    check_installed()
    given, found = list(options.input_names or ["image"]), list(options.output_names or names)
    axes = {given[0]: {1: "height", 2: "width"}, **{name: {0: "found"} for name in found}}
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that are recorded: the comparison shows those that matter
            torch.onnx.export(
                detector,
                (image,),
                file,
                dynamo=False,
                opset_version=options.opset or OPSET,
                input_names=given,
                output_names=found,
                dynamic_axes=axes,
            )
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"torch.onnx can't record {type(detector.detector).__name__}: {reason_of(error)}\n"
            "Export a part of it, such as model.backbone"
        ) from error
    return opened(file)


def matched(actual: list[Tensor], expected: list[Tensor], names: list[str]) -> list[Tensor]:
    """What a file found, in the order of what was expected: things of nearly equal scores may have changed places.

    Things go together that have the same label, and boxes and scores nearest to each other; each is taken once.
    """
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return actual
    mine, theirs = (dict(zip(names, each, strict=True)) for each in (actual, expected))
    off = torch.cdist(theirs["boxes"].double(), mine["boxes"].double(), p=torch.inf)
    off += (theirs["scores"][:, None].double() - mine["scores"].double()).abs()
    off[theirs["labels"][:, None] != mine["labels"]] = torch.inf
    order: list[int] = []
    for row in off:
        row[order] = torch.inf
        order.append(int(row.argmin()))
    if len(set(order)) < len(order):  # labels differ, which the comparison says
        return actual
    return [x[order] for x in actual]
