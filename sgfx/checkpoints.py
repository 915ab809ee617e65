"""Plain checkpoints of compiled models: state dicts, as training scripts write them, opened into a dense model.

1. The extra states of a state dict say how each regrouped layer is grouped; state dicts of earlier versions say it by
   ``filters``, ``inputs`` and ``block_sizes``. Without either it is a dense model's.
2. What a state dict does not say is refused: which channels of norms and other layers were eliminated, and what is
   masked. Hyperparameters and the reasons of layers that were left alone are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models_zoo.checkpoint import read_state_dict, renamed
from passes.copying import copy_model
from passes.errors import InputError
from passes.layers.encoding import as_tensor, decode, encode
from passes.layers.grouped import Grouped, former_structure
from passes.layers.masked import Masked
from passes.lowering import lower
from passes.plan import LayerPlan, layer_shape
from passes.structure import check_regroupable, ties

M = TypeVar("M", bound=nn.Module)

_EXTRA = "_extra_state"
_OTHER = (
    "Make a dense model of the class and options that the compiled one had, its head included (load first, and replace "
    "the head then). Where channels were eliminated, a plain checkpoint doesn't say which: use sgfx.save"
)


def is_torch_file(content: bytes) -> bool:
    """Whether a file begins as those that ``torch.save`` writes, in its present or its old format."""
    return content[8:9] != b"{" and content.startswith((b"PK\x03\x04", b"\x80"))


def read_torch_file(file: Path, content: bytes) -> dict[str, Tensor]:
    """The state dict in a file that ``torch.save`` wrote, whatever it lies under. Nothing is unpickled."""
    try:
        return read_state_dict(file, content)
    except ValueError as error:
        raise InputError(str(error)) from error


def from_state_dict(model: M, state: Mapping[str, Tensor], file: Path) -> M:
    """A copy of a dense `model`, regrouped as a compiled model's state dict says and with its values.

    Args:
        model: dense.
        state: the state dict, names with or without what wrappers put before them.
        file: where it is from.

    Raises:
        InputError: the state dict is not that of a compiled model, or of one that `model` is not the dense form of.
    """
    try:
        return _regrouped(model, _completed(renamed(dict(state), model.state_dict()), model))
    except InputError as error:
        raise InputError(f"{file} does not fit {type(model).__name__}: {error}") from error


def _regrouped(model: M, state: Mapping[str, Tensor]) -> M:
    made = {path: _plan(path, model, state) for path in _structured(model, state)}
    if not made:
        raise InputError(
            "it is not one that sgfx.save wrote, and has no structure: it holds the weights of a dense model. Load "
            "them with models_zoo.load_checkpoint or model.load_state_dict"
        )
    left = {path: m for path, m in model.named_modules() if path not in made and isinstance(m, _ConvNd | nn.Linear)}
    small = copy_model(model)
    lower(small, made | {path: LayerPlan.of(m, reason="dense in the checkpoint") for path, m in left.items()})
    state = _of_today(state, made)
    _check_names(small, state)
    try:
        small.load_state_dict(state)
    except Exception as error:  # values can be anything
        raise InputError(f"its values can't be loaded: {error}") from error
    return small


def _structured(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Paths of the layers that have a structure in a state dict, in its order."""
    own = model.state_dict()  # has the extra states of modules that are not ours
    marks = (_EXTRA, *Grouped.FORMER_BUFFERS[-1:], *Masked.FORMER_BUFFERS)
    return [name.rpartition(".")[0] for name in state if name.rpartition(".")[2] in marks and name not in own]


def _plan(path: str, model: nn.Module, state: Mapping[str, Tensor]) -> LayerPlan:
    """The plan of the dense layer at `path`, by its structure in a state dict."""
    before = f"{path}." if path else ""
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"the model lacks layer {path!r}. {_OTHER}") from None
    weight, own = state.get(f"{before}weight"), getattr(layer, "weight", None)
    if weight is not None and own is not None and weight.dim() > 1 and weight.shape == own.shape:
        raise InputError(
            f"layer {path!r} is masked, between two pruning steps. Make the Pruner anew, and load its state with "
            "pruner.load_state_dict, or these weights with pruner.model.load_state_dict"
        )
    try:
        check_regroupable(layer)
        if before + _EXTRA in state:
            return decode(state[before + _EXTRA], layer_shape(layer))
        former = {name: state[before + name] for name in Grouped.FORMER_BUFFERS if before + name in state}
        return former_structure(former, layer_shape(layer))
    except InputError as error:
        raise InputError(f"layer {path!r}: {error}. {_OTHER}") from error


def _of_today(state: Mapping[str, Tensor], made: Mapping[str, LayerPlan]) -> dict[str, Tensor]:
    """A state dict with the layers' structure in extra states, which earlier versions had in buffers."""
    former = {f"{path}.{name}".lstrip(".") for path in made for name in Grouped.FORMER_BUFFERS}
    codes = {f"{path}.{_EXTRA}".lstrip("."): as_tensor(encode(plan)) for path, plan in made.items()}
    return codes | {name: value for name, value in state.items() if name not in former}


def _check_names(small: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of a regrouped model with those of a state dict."""
    own = small.state_dict()
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"it lacks {_few(missing)}")
    if extra := [name for name in state if name not in own]:
        problems.append(f"it has {_few(extra)}, which the model has not")
    shapes = {name: (list(state[name].shape), list(own[name].shape)) for name in own if name in state}
    if wrong := [name for name, (theirs, mine) in shapes.items() if theirs != mine and not name.endswith(_EXTRA)]:
        theirs, mine = shapes[wrong[0]]
        problems.append(f"{_few(wrong)} differ in shape ({theirs} in the file and {mine} in the model)")
    if problems:
        raise InputError(f"{'; '.join(problems)}. {_OTHER}")


def _completed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with all names of a tensor that has several: ``save_pretrained`` writes one of them."""
    for name, first in ties(model).items():
        if (name in state) != (first in state):
            state[name] = state[first] = state[name if name in state else first]
    return state


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
