"""A model by a name: of the zoo, of torchvision, of timm, or of a function of the user's."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
from passes.errors import InputError, let_memory_errors_pass
from sgfx.training.modules import preserved_modes


def make_model(name: str, options: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Make a model with random weights that follow from `seed` (or whatever a function of the user's gives it).

    Args:
        name: a name of `models_zoo`, else of torchvision, else of timm; or ``package.module:function``, looked for in
            the working folder too.
        options: passed on.
        seed: of the weights.

    Raises:
        InputError: there is none of that name, or it can't be made with these options.
    """
    torch.manual_seed(seed)
    try:
        model = _function(name)(**options) if ":" in name else _named(name, options)
    except InputError:
        raise
    except Exception as error:  # code of others
        let_memory_errors_pass(error)
        raise InputError(
            f"model {name!r} can't be made with {dict(options)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} gave a {type(model).__name__}; it must give a torch.nn.Module")
    return model


def _named(name: str, options: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    if name in models_zoo.list():
        return models_zoo.create(name, **options)
    if name in list_models():
        known = inspect.signature(get_model_builder(name)).parameters
        own = {key: None for key in ("weights", "weights_backbone") if key in known}  # or torchvision would download
        made: nn.Module = get_model(name, **{**own, **options})
        return made
    names = [*models_zoo.list(), *list_models()]
    has_timm = find_spec("timm") is not None
    if has_timm:
        import timm

        if timm.is_model(name):
            timms: nn.Module = timm.create_model(name, pretrained=False, **options)
            return timms
        names += timm.list_models()
    near = difflib.get_close_matches(name, names)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    rest = "" if has_timm else " (timm, which has more, isn't installed)"
    raise InputError(f"models_zoo, torchvision and timm have no model {name!r}{meant}{rest}")


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except ImportError as error:
        raise InputError(f"model {name!r}: can't import {module} ({error}); is it in this folder?") from error
    if not callable(made := getattr(found, function, None)):
        raise InputError(f"model {name!r}: {module} has no function {function!r}")
    return made


def check_fit(model: nn.Module, inputs: Tensor, classes: int, name: str) -> None:
    """See that the model takes the images and has a score for each class.

    Args:
        model: the model.
        inputs: a few images ``[N, C, H, W]``, on its device.
        classes: of the data.
        name: of the model.

    Raises:
        InputError: it doesn't.
    """
    logits = check_takes(model, inputs, name)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{name} must give scores [N, classes], not {given}")
    if logits.shape[1] != classes:
        raise InputError(
            f"{name} has scores for {logits.shape[1]} classes, and the data have {classes}: make a model for as many "
            f"(--model_options.num_classes {classes} for most), put a new head on it (--head {classes}), or give other "
            "data"
        )


def check_takes(model: nn.Module, inputs: Tensor, name: str) -> Any:
    """See that the model takes the images, and return what it gives for them in eval mode.

    Raises:
        InputError: it doesn't.
    """
    try:
        with torch.no_grad(), preserved_modes(model):
            return model.eval()(inputs)
    except Exception as error:  # code of others
        let_memory_errors_pass(error)
        raise InputError(f"{name} does not take images {list(inputs.shape)}: {error}") from error


def own_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or os.environ.get("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))
