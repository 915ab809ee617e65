"""Loading trained weights from a file into a model: all of them, or none.

A file is data and never code: it is read by ``torch.load(..., weights_only=True)`` or by safetensors, and a file that
needs more than that is refused. Names, shapes and values are all checked before the first weight of the model changes.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import PROTO, UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_AVERAGES = ("model_ema", "state_dict_ema")  # read where there is nothing else
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel and averages, torch.compile, Lightning
_COUNT = "n_averaged"  # what torch's AveragedModel keeps beside its model
_EXTRA = "_extra_state"  # torch's name for what modules keep beside tensors; they know themselves what fits
_UNTRACKED = "num_batches_tracked"  # checkpoints older than PyTorch 0.4.1 lack it, and inference does not use it


def load_checkpoint(model: M, path: str | os.PathLike[str]) -> M:
    """Load the weights in the file at `path` into `model`, in place; after an error the model is as it was.

    The file holds a state dict, or a dict with one under ``state_dict``, ``model_state_dict`` or ``model`` (or where
    there is none of these an average under ``model_ema`` or ``state_dict_ema``), written by ``torch.save``; or it is a
    ``.safetensors`` file. What begins every name is dropped: ``module.``, as ``DataParallel`` leaves it, ``_orig_mod.``
    or ``model.``.

    Args:
        model: the model to change. Its weights keep their types and devices.
        path: the file.

    Returns:
        The model given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, would need unpickling, or has other names or shapes than the model.
    """
    file = Path(path)
    own = model.state_dict()
    state = renamed(read_state_dict(file), own)
    _check_names(state, own, file)
    _check_shapes(state, own, file)
    converted = _converted(state, own, file)
    if any(key.endswith(_EXTRA) for key in own):
        try:
            copy.deepcopy(model).load_state_dict(converted)
        except RuntimeError as error:  # a module doesn't take its extra state, where others have taken theirs
            raise ValueError(f"{file} does not fit this model: {error}") from error
    model.load_state_dict(converted)
    return model


def read_state_dict(file: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint file, whatever it lies under.

    Args:
        file: the file.
        content: all that is in it, of a file that ``torch.save`` wrote; None: the file is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, or would need unpickling.
    """
    return _state_dict(_read(file, content), file)


def _read(file: Path, content: bytes | None) -> Any:
    if content is None and not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{file} {problem}; give the path of a checkpoint file, made by torch.save or safetensors"
        )
    try:
        if content is None and file.suffix.lower() == ".safetensors":
            from safetensors.torch import load

            return load(file.read_bytes())  # not mapped: a file that is truncated meanwhile would end the process
        # Beside weights there often are the options of a training script: a namespace of plain values, and no code.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about how the file was pickled: where it matters, an error follows
            return torch.load(file if content is None else io.BytesIO(content), weights_only=True, map_location="cpu")
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # arbitrary bytes make the readers raise nearly anything, even an OSError
        raise ValueError(_reading_problem(file, error)) from error


def _reading_problem(file: Path, error: Exception) -> str:
    needed = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
    if needed or (isinstance(error, UnpicklingError) and _is_plain_pickle(file)):
        what = f"code ({needed[1] or needed[2]})" if needed else "code"
        return (
            f"{file} was refused: it is not made of weights alone but needs {what}, and files are never unpickled, "
            "because that runs whatever code they hold. If you trust the file, load it where it was made and save its "
            "weights alone: torch.save(model.state_dict(), path)"
        )
    if isinstance(error, UnpicklingError):
        cause = "not what torch.save writes"  # the error itself is half a page, and advises to unpickle
    else:
        first_sentence = str(error).partition(". ")[0].strip(". ")
        cause = f"{type(error).__name__}: {first_sentence or 'it ends early'}"
    return (
        f"{file} is not a checkpoint, or a damaged one ({cause}). Expected a file made by "
        "torch.save(model.state_dict(), path), or a .safetensors file; check its size, or copy it again"
    )


def _is_plain_pickle(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1) == PROTO


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in (*_WRAPPERS, *_AVERAGES) if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return dict(content)
        found = f"a dict with the entries {_few(content)}" if content else "an empty dict"
    raise ValueError(
        f"{file} holds {found} where a state dict (names and tensors) was expected, by itself or under "
        f"{', '.join(map(repr, (*_AVERAGES, *_WRAPPERS)))}. Save one with torch.save(model.state_dict(), path)"
    )


def renamed(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Names as the model has them: without what wrappers put before them, torchvision's DenseNets in today's spelling.

    Args:
        state: the state dict of a checkpoint.
        own: the model's names.
    """
    own = set(own)
    while prefix := next((each for each in _PREFIXES if _all_begin_with(each, state) > _all_begin_with(each, own)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key != _COUNT}
    modernised = {}
    for key, value in state.items():
        # The files that torchvision publishes for its DenseNets say `norm.1` for what its code calls `norm1`.
        modern = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
        modernised[modern if modern in own and modern not in state else key] = value
    return modernised


def _all_begin_with(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names if name != _COUNT)


def _check_names(state: dict[str, Tensor], own: Mapping[str, Any], file: Path) -> None:
    # A module that keeps an extra state may know names of earlier versions: it judges them itself, on loading.
    judges = {key.removesuffix(_EXTRA) for key in own if key.endswith(_EXTRA)}
    missing = [key for key in own if key not in state and not key.endswith((_UNTRACKED, _EXTRA))]
    unexpected = [key for key in state if key not in own and key[: key.rfind(".") + 1] not in judges]
    problems = []
    if missing:
        problems.append(f"it lacks {len(missing)} of the model's names: {_few(missing)}")
    if unexpected:
        problems.append(f"it has {len(unexpected)} that the model does not: {_few(unexpected)}")
    if problems:
        raise ValueError(
            f"{file} is not of this model: {'; '.join(problems)}. "
            "Create the model that the file was made from (the same name, depth and growth)"
        )


def _check_shapes(state: dict[str, Tensor], own: Mapping[str, Any], file: Path) -> None:
    wrong = [key for key in _values(state, own) if state[key].shape != own[key].shape]
    if wrong:
        shapes = [f"{key} is {_shape(state[key])} in the file and {_shape(own[key])} in the model" for key in wrong]
        raise ValueError(
            f"{file} does not fit this model: {_few(shapes)}. Create the model with the options that the file was made "
            "with (num_classes for the last layer, in_channels for the first, growth for all)"
        )


def _converted(state: dict[str, Tensor], own: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Values as the model stores them, made before it changes: a copy that fails would leave it half loaded."""
    converted: dict[str, Any] = {key: value for key, value in own.items() if not key.endswith(_EXTRA)} | state
    for key in _values(state, own):
        value = state[key]
        try:
            converted[key] = torch.empty_like(own[key], device="cpu").copy_(value)
        except RuntimeError as error:
            raise ValueError(
                f"{file} has values for {key} that can't be copied into an ordinary tensor "
                f"({value.layout}, {value.dtype} on {value.device}). Save it as a dense tensor on the CPU"
            ) from error
    return converted


def _values(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """The names of parameters and buffers, which are compared and copied one by one."""
    return [key for key in state if key in own and not key.endswith(_EXTRA)]


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _few(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    rest = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"{', '.join(texts[:3])}{rest}"
