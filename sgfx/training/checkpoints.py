"""Whether a checkpoint belongs to a run, before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.layers import Structured
from passes.models import unhooked_copy

KIND = "checkpoint"
_EXTRA = "_extra_state"
_PARTS = {"model", "model_ema", "optimizer", "scheduler", "scaler", "options", "position", "records", "processes"}


def check_checkpoint(
    checkpoint: Mapping[str, Any], file: Path, model: nn.Module, options: Mapping[str, Any], processes: int
) -> None:
    """Refuse the checkpoint of another run.

    Args:
        checkpoint: what was read.
        file: where it is from.
        model: is not changed.
        options: of this run, as plain data.
        processes: of this run.

    Raises:
        InputError: it was made with other options, in another number of processes, or of another model or structure.
    """
    if not checkpoint.keys() >= _PARTS:
        raise InputError(f"{file} is damaged: it lacks {', '.join(sorted(_PARTS - checkpoint.keys()))}")
    saved = checkpoint["options"]
    other = [
        f"{name} ({saved.get(name)!r} in the file, {value!r} here)"
        for name, value in options.items()
        if saved.get(name) != value
    ]
    if other:
        raise InputError(
            f"{file} was made with other options: {', '.join(other)}. Resume with the options of before, or give "
            "another folder to train on from its weights"
        )
    if len(checkpoint["processes"]) != processes:
        raise InputError(
            f"{file} was made in {len(checkpoint['processes'])} processes, and this is a run of {processes}: resume in "
            "as many"
        )
    _check_model(checkpoint["model"], file, model)


def _check_model(state: Mapping[str, Any], file: Path, model: nn.Module) -> None:
    own = model.state_dict()
    structured = [path for path, module in model.named_modules() if isinstance(module, Structured)]
    codes = [f"{path}.{_EXTRA}".lstrip(".") for path in structured]
    for path, code in zip(structured, codes, strict=True):  # first: other shapes follow from another structure
        if code in state and not torch.equal(own[code].cpu(), state[code].cpu()):
            raise InputError(
                f"{file} belongs to a model of another structure: layer {path!r} is grouped or masked otherwise than "
                "here. Compile with the options of before, or load the state of the Pruner first; sgfx.load opens the "
                "weights of a compiled model"
            )
    kinds, given = ({name: _kind(value) for name, value in each.items()} for each in (own, state))
    wrong = sorted(name for name in kinds.keys() | given.keys() if kinds.get(name) != given.get(name))
    wrong = [name for name in wrong if name not in codes or name not in state]
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{file} belongs to another model: {first!r} is {given.get(first, 'not there')} in the file and "
            f"{kinds.get(first, 'not there')} in {type(model).__name__} ({len(wrong)} of {len(own)} differ). Resume "
            "with a model of the same kind: dense, or compiled with the options of before, or lowered"
        )
    try:
        unhooked_copy(model).load_state_dict(dict(state))
    except Exception as error:  # modules may refuse their extra state
        let_memory_errors_pass(error)
        raise InputError(f"{file} does not fit {type(model).__name__}: {error}") from error


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "no tensor"
