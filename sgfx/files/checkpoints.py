"""Plain checkpoints of compiled models: state dicts, as training scripts write them, opened into a dense model.

1. The extra states of a state dict say how each regrouped layer is grouped; state dicts of earlier versions say it by
   ``filters``, ``inputs`` and ``block_sizes``. Without either it is a dense model's.
2. Which channels were eliminated is said of regrouped layers alone. Norms and other layers follow from these: channels
   are eliminated anew, and where that leaves other ones, the checkpoint is refused.
3. Hyperparameters and the reasons of layers that were left alone are not in a state dict. Masked ones are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models_zoo.checkpoint import read_state_dict, renamed
from passes.compression import lower
from passes.elimination import remove_unread_filters
from passes.errors import InputError, PassError, let_memory_errors_pass
from passes.layers import (
    Cut,
    Grouped,
    LayerPlan,
    Masked,
    as_tensor,
    cuts,
    decode_whole,
    encode,
    former_structure,
    layer_shape,
)
from passes.models import check_regroupable, copy_model, cut_from_record, ties

M = TypeVar("M", bound=nn.Module)

_EXTRA = "_extra_state"
_OTHER = (
    "Make a dense model of the class and options that the compiled one had, its head included (load first, and replace "
    "the head then)"
)
_SAVE = "A plain checkpoint doesn't say all of what was eliminated: use sgfx.save"


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
    found = {path: _structure(path, model, state) for path in _structured(model, state)}
    made = {path: plan for path, (plan, _) in found.items()}
    if not made:
        raise InputError(
            "it is not one that sgfx.save wrote, and has no structure: it holds the weights of a dense model. Load "
            "them with models_zoo.load_checkpoint or model.load_state_dict"
        )
    left = {path: m for path, m in model.named_modules() if path not in made and isinstance(m, _ConvNd | nn.Linear)}
    small = copy_model(model)
    lower(small, made | {path: LayerPlan.of(m, reason="dense in the checkpoint") for path, m in left.items()})
    cut = {path: cut for path, (_, cut) in found.items() if cut.outputs is not None or cut.inputs is not None}
    if cut:
        _eliminate(small, cut)
    state = _of_today(state, made)
    _check_names(small, state)
    try:
        small.load_state_dict(state)
    except Exception as error:  # values can be anything
        let_memory_errors_pass(error)
        raise InputError(f"its values can't be loaded: {error}") from error
    return small


def _structured(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Paths of the layers that have a structure in a state dict, in its order."""
    own = model.state_dict()  # has the extra states of modules that are not ours
    marks = (_EXTRA, *Grouped.FORMER_BUFFERS[-1:], *Masked.FORMER_BUFFERS)
    return [name.rpartition(".")[0] for name in state if name.rpartition(".")[2] in marks and name not in own]


def _structure(path: str, model: nn.Module, state: Mapping[str, Tensor]) -> tuple[LayerPlan, Cut]:
    """The plan of the dense layer at `path`, and what remains of its channels, by a state dict."""
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
            plan, (outputs, inputs) = decode_whole(state[before + _EXTRA], layer_shape(layer))
            return plan, cut_from_record({"outputs": outputs, "inputs": inputs}, layer)
        former = {name: state[before + name] for name in Grouped.FORMER_BUFFERS if before + name in state}
        return former_structure(former, layer_shape(layer)), Cut()
    except InputError as error:
        raise InputError(f"layer {path!r}: {error}. {_OTHER}") from error


def _eliminate(small: nn.Module, expected: Mapping[str, Cut]) -> None:
    """Eliminate anew, in place, and hold the result to what is known of regrouped layers."""
    try:
        remove_unread_filters(small)
    except (InputError, PassError) as error:
        raise InputError(f"channels were eliminated, which can't be done anew: {error}. {_SAVE}") from error
    found = {path: cut for path, cut in cuts(small).items() if isinstance(small.get_submodule(path), Grouped)}
    for path in {**expected, **found}:
        mine, theirs = found.get(path, Cut()), expected.get(path, Cut())
        if not (_equal(mine.outputs, theirs.outputs) and _equal(mine.inputs, theirs.inputs)):
            raise InputError(
                f"other channels of layer {path!r} were eliminated than would be now, without example_inputs. {_SAVE}"
            )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


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
        if name in state:
            state.setdefault(first, state[name])
        elif first in state:
            state[name] = state[first]
    return state


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
