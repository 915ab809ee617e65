"""Examples without labels, as calibration and distillation take them: checked, and cut into batches of one size."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from passes.calibration.image_lists import image_lists
from passes.errors import InputError
from passes.infra.compilation import Fact
from passes.infra.random_state import own_random_state
from passes.models.copying import copy_inputs
from passes.models.detectors import is_detector
from passes.models.values import mapped, tensors_in
from passes.options.arguments import bound_arguments

BATCH = 32  # examples: large enough to keep the cores busy, small enough for memory
JUDGED = 4  # one example in so many
Arguments = tuple[Any, ...]
EXAMPLES = Fact[list[Arguments]]("examples")  # the arguments that the model is to be called with, batch by batch


def read_examples(data: Any, name: str, model: nn.Module) -> list[Arguments]:
    """Read `data` once and return the arguments that `model` is to be called with, batch by batch.

    Args:
        data: a tensor ``[N, …]`` of examples, or an iterable of batches; a batch is a tensor, or a tuple or list that
            starts with the input (whatever follows, such as labels, is not looked at). Where the forward of the model
            requires several inputs, a batch starts with all of them, or with a tuple of them. A batch that is a dict
            holds keyword arguments; those that the forward does not know, and ``labels``, are left out.
        name: what the caller calls it, for messages.
        model: the arguments are moved to the device of its first parameter.

    Returns:
        The arguments; tensors are cut into batches of at most 32 examples.

    Raises:
        InputError: there are none, or one holds NaN or infinite values, or too few inputs.
        TypeError: it is neither a tensor nor an iterable of batches.
    """
    if not isinstance(data, Tensor) and (not isinstance(data, Iterable) or isinstance(data, Mapping | str)):
        raise TypeError(
            f"{name} must be a tensor of examples [N, …] or an iterable of batches, not {type(data).__name__}"
        )
    if isinstance(data, Tensor) and data.dim() == 0:
        raise InputError(f"{name} is a single number: give a tensor of examples [N, …]")
    required, device = _required_inputs(model), next((p.device for p in model.parameters()), None)
    detector = is_detector(model)
    batches: list[Arguments] = []
    with own_random_state():  # a loader that shuffles draws from the global one
        for number, batch in enumerate([data] if isinstance(data, Tensor) else data, 1):
            parts: Iterable[Arguments]
            if detector:
                parts = image_lists(batch, f"batch {number} of {name}")
            else:
                parts = _cut(_arguments(model, batch, required, name, number))
            for given in parts:
                own = given if isinstance(data, Tensor | list | tuple) else copy_inputs(given)  # may be filled again
                batches.append(mapped(own, lambda x: x.to(device)))
    batches = [given for given in batches if example_count(given)]
    if not batches:
        raise InputError(
            f"{name} gave no examples: is the dataset empty, or was it an iterator that had been used up before?"
        )
    return batches


def parted(batches: list[Arguments]) -> tuple[list[Arguments], list[Arguments]]:
    """Batches in two parts: to fit to, and, every fourth example, to judge by; the latter may be none.

    Of a batch that can't be cut, or may be a single example, all goes to one part: every fourth of these to the second.
    """
    fitted: list[Arguments] = []
    judged: list[Arguments] = []
    whole = 0
    for given in batches:
        if _is_cut(given) and len(given[0]) >= JUDGED and all(x.dim() > 1 for x in given):
            places = torch.arange(len(given[0]), device=given[0].device) % JUDGED == JUDGED - 1
            fitted.append(tuple(x[~places] for x in given))
            judged.append(tuple(x[places] for x in given))
        else:
            whole += 1
            (judged if whole % JUDGED == 0 else fitted).append(given)
    return fitted, judged


def example_count(given: Arguments) -> int:
    """Number of examples of a batch."""
    return len(given[0]) if isinstance(given[0], Tensor | list | tuple) else 1


def _required_inputs(model: nn.Module) -> int:
    """How many inputs the forward of a model can't do without, at least 1."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def _check_positional(model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    keyword = next((p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty), None)
    if keyword is not None:
        raise InputError(
            f"{type(model).__name__}.forward requires the keyword argument {keyword!r}: give batches that are dicts of "
            "keyword arguments"
        )


def _named(model: nn.Module, batch: Mapping[str, Any], where: str) -> Arguments:
    """A batch that is a dict, as arguments: what the forward knows by these names, without ``labels``."""
    parameters = inspect.signature(model.forward).parameters
    known = {key: value for key, value in batch.items() if key in parameters and key != "labels"}
    if not known:
        raise InputError(
            f"{where} is a dict with the keys {sorted(map(str, batch))}, and {type(model).__name__}.forward takes none "
            f"of them: it takes {', '.join(map(repr, parameters))}"
        )
    return bound_arguments(model, (), known, where)


def _arguments(model: nn.Module, batch: Any, required: int, name: str, number: int) -> Arguments:
    """What a batch starts with, or what a dict holds by name, as arguments."""
    several = isinstance(batch, tuple | list) and len(batch) > 0
    inputs: Any = batch[:required] if several else (batch,)
    by_name = isinstance(batch, Mapping)
    if by_name:
        inputs = _named(model, batch, f"batch {number} of {name}")
    else:
        _check_positional(model)
    if required > 1 and several and isinstance(batch[0], tuple | list):
        inputs = batch[0]
    tensors = tensors_in(inputs)
    if not tensors or any(tensor.dim() == 0 for tensor in tensors):
        raise TypeError(
            f"{name} must give batches that are tensors, or tuples or lists with the input first; batch {number} is a "
            f"{type(batch).__name__}"
        )
    if len(inputs) != required and not by_name:
        raise InputError(
            f"the model requires {required} inputs, but batch {number} of {name} holds {len(inputs)}: give batches "
            "that are tuples and start with all of them"
        )
    if any(tensor.layout is not torch.strided for tensor in tensors):
        raise TypeError(f"batch {number} of {name} holds a sparse tensor: give dense ones (tensor.to_dense())")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(f"batch {number} of {name} holds NaN or infinite values: leave these examples out")
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)


def _cut(given: Arguments) -> list[Arguments]:
    """One batch in parts of `BATCH` examples, if it is made of tensors of equal length."""
    if not _is_cut(given):
        return [given]
    return list(zip(*(torch.split(x, BATCH) for x in given), strict=True))


def _is_cut(given: Arguments) -> bool:
    """Whether a batch is made of tensors of equal length."""
    return all(isinstance(x, Tensor) and len(x) == len(given[0]) for x in given)


def single_image(given: Arguments) -> str:
    """What to say behind a message that arguments don't fit, where the first may be an image without a batch."""
    first = given[0] if given else None
    if not isinstance(first, Tensor) or first.dim() != 3:
        return ""
    return ". If that is a single image [C, H, W], give batches [N, C, H, W]: a DataLoader's, or image[None]"
