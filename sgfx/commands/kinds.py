"""What the commands do otherwise for each task: the data, what a model must take and give, what is measured."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from passes.errors import InputError
from passes.models import is_detector, mapped
from sgfx.commands.heads import replace_head
from sgfx.commands.models import check_fit, check_takes
from sgfx.commands.options import Common
from sgfx.data.detection import DetectionLoaders, open_detection
from sgfx.data.loaders import Loaders
from sgfx.data.normalization import normalization
from sgfx.data.sources import open_data
from sgfx.training.modules import preserved_modes
from sgfx.training.tasks.classification import TopMeter
from sgfx.training.tasks.detection import class_labels
from sgfx.training.tasks.precision import PrecisionMeter, average_precision

AnyLoaders = Loaders | DetectionLoaders
Arguments = tuple[Any, ...]


@contextmanager
def _evaluating(model: nn.Module, loaders: AnyLoaders, progress: bool) -> Iterator[Any]:
    """The batches to measure on, under a bar, with the model in eval mode."""
    shown = None if progress else True
    bar = tqdm(loaders.val, desc="evaluate", leave=False, disable=shown)
    with preserved_modes(model), torch.inference_mode(), bar as batches:
        model.eval()
        yield batches


class Kind(ABC):
    """One task.

    Attributes:
        task: its name, as `sgfx.Trainer` takes it.
        baseline: the recipe of `sgfx train` where none is given.
        best: what is drawn over the epochs.
    """

    task: ClassVar[str]
    baseline: ClassVar[str]
    best: ClassVar[str]

    @abstractmethod
    def open(self, options: Common, batch_size: int) -> AnyLoaders:
        """The data, in batches.

        Raises:
            InputError: there are none, or an option is not of this task.
        """

    @abstractmethod
    def check(self, model: nn.Module, loaders: Any, options: Common) -> None:
        """See that a model, with its weights and on its device, takes the data and knows as many classes.

        Raises:
            InputError: it doesn't.
        """

    @abstractmethod
    def inputs(self, loaders: Any, device: torch.device) -> Arguments:
        """What the model is called with for one image; the targets too, where it takes them in training."""

    @abstractmethod
    def results(self, model: nn.Module, loaders: Any, *, progress: bool) -> dict[str, float]:
        """What is measured of a model in eval mode on the validation data: shares in [0, 1]."""


class Classifying(Kind):
    """Top-1, and top-5 where there are more than five classes."""

    task, baseline, best = "classification", "cifar-baseline", "top1"

    def open(self, options: Common, batch_size: int) -> Loaders:
        """See `Kind`."""
        return Loaders(
            open_data(options.data, download=options.download, size=options.image_size),
            normalization=None if options.normalization is None else normalization(options.normalization),
            size=options.image_size,
            batch_size=options.batch_size or batch_size,
            workers=_workers(options),
            mixup=options.mixup,
            cutmix=options.cutmix,
        )

    def check(self, model: nn.Module, loaders: Loaders, options: Common) -> None:
        """See `Kind`; a new head is put on, where that was asked for."""
        images = loaders.example.to(_device(model))
        if options.head is not None:
            check_takes(model, images, options.model)
            torch.manual_seed(options.seed)
            replace_head(model, images, options.head)
        check_fit(model, images, len(loaders.classes), options.model)

    def inputs(self, loaders: Loaders, device: torch.device) -> Arguments:
        """See `Kind`."""
        return (loaders.example[:1].to(device),)

    def results(self, model: nn.Module, loaders: Loaders, *, progress: bool) -> dict[str, float]:
        """See `Kind`."""
        device, meter = _device(model), TopMeter()
        with _evaluating(model, loaders, progress) as batches:
            for images, targets in batches:
                meter.update(model(images.to(device)).float(), targets.to(device))
        return meter.results([meter.state()])


class Detecting(Kind):
    """Mean average precision, and that of each class."""

    task, baseline, best = "detection", "detection-baseline", "map"

    def open(self, options: Common, batch_size: int) -> DetectionLoaders:
        """See `Kind`."""
        elsewhere = {
            "image_size": "--model_options.min_size",
            "normalization": "--model_options.image_mean and image_std",
        }
        for name in ("download", "normalization", "image_size", "mixup", "cutmix", "label_smoothing", "head"):
            if getattr(options, name) != _DEFAULTS[name]:
                hint = f": give {elsewhere[name]}" if name in elsewhere else ""
                raise InputError(f"--{name} is of --task classification{hint}")
        size = options.batch_size or batch_size
        return DetectionLoaders(open_detection(options.data), batch_size=size, workers=_workers(options))

    def check(self, model: nn.Module, loaders: DetectionLoaders, options: Common) -> None:
        """See `Kind`."""
        if not is_detector(model):
            raise InputError(
                f"--task detection needs a detector as torchvision has them, and {options.model} is a "
                f"{type(model).__name__}: --model models_zoo:faster_rcnn --model_options.backbone resnet18, say"
            )
        known, classes = class_labels(model), len(loaders.classes)
        if known is not None and known.stop != classes + 1:
            raise InputError(
                f"{options.model} knows labels up to {known.stop - 1}, and the data have {classes} classes: make it "
                f"for these and the background (--model_options.num_classes {classes + 1})"
            )

    def inputs(self, loaders: DetectionLoaders, device: torch.device) -> Arguments:
        """See `Kind`."""
        images, targets = loaders.example
        return mapped((images[:1], targets[:1]), lambda x: x.to(device))

    def results(self, model: nn.Module, loaders: DetectionLoaders, *, progress: bool) -> dict[str, float]:
        """See `Kind`."""
        device, meter = _device(model), PrecisionMeter()
        with _evaluating(model, loaders, progress) as batches:
            for images, targets in batches:
                meter.update(model([image.to(device) for image in images]), targets)
        total, by_label = average_precision(meter.state()["images"])
        return total | {f"AP {loaders.classes[label - 1]}": value for label, value in by_label.items()}


KINDS: Mapping[str, Kind] = {kind.task: kind for kind in (Classifying(), Detecting())}
_DEFAULTS = {each.name: each.default for each in fields(Common)}


def _workers(options: Common) -> int:
    return min(4, os.cpu_count() or 1) if options.workers is None else options.workers


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
