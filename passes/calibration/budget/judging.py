"""Judging: how far a compressed network as a whole is from the dense one, on examples that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from passes.calibration.calibrating import solved
from passes.calibration.data import Arguments, parted
from passes.calibration.output_distance import distance
from passes.errors import InputError
from passes.infra.progress import Progress, silent
from passes.infra.random_state import own_random_state
from passes.layers.grouped import Grouped
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.detectors import is_detector
from passes.options.arguments import call_model


def held_out_error(
    dense: nn.Module,
    small: nn.Module,
    batches: list[Arguments],
    leaves: Collection[str] = (),
    progress: Progress = silent,
) -> float:
    """How far the outputs of a compressed model are from the dense one's, calibrated on a part of the examples.

    Args:
        dense: the model; it is not changed.
        small: what was made of it; it is not changed.
        batches: arguments; one example in four is judged by.
        leaves: paths of modules that are not to be traced into.
        progress: shows how far it is.

    Returns:
        The mean distance on the examples that are judged by; NaN where there are none, they can't be told apart from
        what else a batch holds, or outputs can't be compared.
    """
    fitted, judged = parted(batches)
    if not fitted:
        return math.nan
    teacher, work = unhooked_copy(dense).eval(), unhooked_copy(small).eval()
    layers = sum(isinstance(module, Grouped) for module in work.modules())
    with own_random_state(), torch.no_grad(), progress("compare ratios", layers, "layer") as tick:
        try:
            solved(dense, work, fitted, leaves, tick)
            found = [distance(_outputs(work, x), _outputs(teacher, x)).item() for x in judged]
        except InputError:  # what is really wrong with the examples is said where all of them are used
            return math.nan
    return sum(found) / len(found) if found else math.nan


def _outputs(model: Any, inputs: Arguments) -> Any:
    """What a model gives; of a detector, whose boxes are a choice by value, the maps of its backbone."""
    if not is_detector(model):
        return call_model(model, copy_inputs(inputs))
    images, _ = model.transform(*copy_inputs(inputs))
    return model.backbone(images.tensors)
