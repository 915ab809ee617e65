"""A run: its folder with ``config.yaml``, its data and its model, as train, compress and evaluate need them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

import models_zoo
from passes.errors import InputError
from sgfx.commands.kinds import KINDS, AnyLoaders, Arguments
from sgfx.commands.models import make_model, own_device
from sgfx.commands.options import Common, CompressOptions
from sgfx.commands.parsing import read_config, write_config
from sgfx.data.sources import MADE
from sgfx.files.container import holds_compiled
from sgfx.files.files import load
from sgfx.files.writing import replacing
from sgfx.training.recipes import Phase, Recipe, recipe

C = TypeVar("C", bound=Common)
CONFIG, FINAL = "config.yaml", "final.safetensors"
UNRELATED = ("out", "progress")  # what has no influence on a run
LAST = ("epochs", "lr", "schedule", "iterations", "momentum", "weight_decay")  # fields of a Phase
ALL = ("accumulate", "clip_norm", "checkpoint_steps", "mixed_precision", "decay_norms")  # of every training
ONCE = ("label_smoothing", "warmup", "ema", "patience", "tracker")  # of the last one


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line, once however many processes there are."""
    if is_main():
        print(text, flush=True)


def open_folder(options: C) -> tuple[Path, C]:
    """Make the folder of a run, or see that what is in it has the same options.

    Returns:
        The folder, and the options with whole paths.

    Raises:
        InputError: it holds a run with other options, or something else.
    """
    options = replace(options, **_whole_paths(options))
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file; give the path of a folder")
    values = {k: _plain(v) for k, v in asdict(options).items() if k not in UNRELATED}
    config = folder / CONFIG
    if config.exists():
        before = _defaults(values) | read_config(config)
        if differences := _differences(before, values):
            raise InputError(
                f"{folder} holds a run with other options ({'; '.join(differences)}): give another --out, or the "
                f"options in {config}"
            )
    elif is_main() and folder.exists() and any(not each.name.startswith(".") for each in folder.iterdir()):
        raise InputError(f"out: {folder} is no run of this command, and is not empty: give another folder")
    elif is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(config) as temporary:
            temporary.write_text(write_config(values), encoding="utf-8")
    return folder, options


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of options, which are in no file of before they came."""
    return {each.name: each.default for each in fields(Common) if each.name in values and each.default is not MISSING}


def _whole_paths(options: Common) -> dict[str, Any]:
    given = {"data": options.data, "checkpoint": options.checkpoint}
    return {k: str(Path(v).resolve()) for k, v in given.items() if v is not None and (k, v) not in _NAMES}


_NAMES = {("data", name) for name in MADE}


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, tuple | list) else value


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in dict.fromkeys((*before, *now))
            for difference in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name} was {before}, and is {now}"]


def open_model(options: Common, loaders: AnyLoaders) -> tuple[nn.Module, Arguments]:
    """The dense model, with its weights, on the device, and what it is called with for one image.

    Raises:
        InputError: (or ValueError) it can't be made, the checkpoint is another model's, or the data don't fit.
    """
    model = make_model(options.model, options.model_options, options.seed)
    if options.checkpoint is not None:
        load_weights(model, Path(options.checkpoint))
    device, kind = own_device(), KINDS[options.task]
    model.to(device)
    kind.check(model, loaders, options)
    return model, kind.inputs(loaders, device)


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a dense model from a file: of `sgfx.save`, which regroups it too, or of a dense model's state dict."""
    if holds_compiled(file):
        load(file, into=model)
    else:
        models_zoo.load_checkpoint(model, file)


def adjusted(options: Common, name: str, loaders: AnyLoaders) -> Recipe:
    """The recipe, with what was given in place of what it says.

    Raises:
        InputError: there is none of that name, or a value is out of range.
    """
    found = recipe(name)
    every = {"task": options.task, "transform": loaders.augmentation, **{k: getattr(options, k) for k in ALL}}
    last = _phase(found.last, {k: getattr(options, k) for k in LAST})
    last = replace(last, options={**every, **{k: getattr(options, k) for k in ONCE}})
    local, step = found.local, found.step
    if local is not None:
        local = replace(local, options=every)
        if isinstance(options, CompressOptions):
            local, step = _phase(local, asdict(options.local)), options.step or step
    return replace(found, last=last, local=local, step=step)


def _phase(phase: Phase, given: dict[str, Any]) -> Phase:
    """A phase with other values; where `epochs` is given without a schedule, its milestones move in proportion."""
    values = {k: v for k, v in given.items() if v is not None}
    epochs = values.get("epochs")
    if epochs and phase.epochs and "schedule" not in values and not isinstance(phase.schedule, str):
        moved = (round(each * epochs / phase.epochs) for each in phase.schedule)
        values["schedule"] = tuple(dict.fromkeys(each for each in moved if 0 < each < epochs))
    if "iterations" in values and "epochs" not in values:
        values["epochs"] = None
    if isinstance(values.get("schedule"), list):
        values["schedule"] = tuple(values["schedule"])
    return replace(phase, **values)
