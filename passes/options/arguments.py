"""Arguments: what a model is called with, as one flat tuple.

It has a value for each of the forward's parameters, in the order in which they stand, up to the last that is given;
those that can only be given by name come last. So a call by keywords and one by position are the same to what follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from passes.errors import InputError

ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]

BY_POSITION = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def as_inputs(example_inputs: object, model: nn.Module) -> tuple[Any, ...] | None:
    """Return example inputs as the arguments of `model`.

    Args:
        example_inputs: a tensor, a tuple of positional arguments whose last element may be a dict of keyword arguments,
            or such a dict alone. Where the last positional argument is a dict itself, an empty one follows it.
        model: the model.

    Raises:
        InputError: they do not fit the model's forward.
        TypeError: they are of another type.
    """
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        return bound_arguments(model, (), example_inputs)
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            "example_inputs must be a tensor, a tuple of positional arguments (the last may be a dict of keyword "
            f"arguments), or such a dict, not {type(example_inputs).__name__}"
        )
    if example_inputs and isinstance(example_inputs[-1], Mapping):
        return bound_arguments(model, example_inputs[:-1], example_inputs[-1])
    return example_inputs


def bound_arguments(
    model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any], what: str = "example_inputs"
) -> tuple[Any, ...]:
    """The arguments of a call by position and by keywords; defaults stand in the gaps. Messages call them `what`."""
    name = f"{type(model).__name__}.forward"
    if not keywords:
        return args
    try:
        given = inspect.signature(model.forward).bind(*args, **keywords).arguments
    except TypeError as error:
        raise InputError(
            f"{what} do not fit {name}: {error} (a dict at the end of a tuple holds keyword arguments; add an "
            "empty dict if it is the last positional argument itself)"
        ) from error
    parameters = _flat(model)
    collecting = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in _COLLECTING]
    for parameter in collecting:
        if parameter.kind is parameter.VAR_KEYWORD and given.get(parameter.name):
            raise InputError(
                f"{name} takes {next(iter(given[parameter.name]))!r} in **{parameter.name}, where its use can't be "
                "followed: wrap the model in a module whose forward names it"
            )
        if parameter.kind is parameter.VAR_POSITIONAL and parameters[len(args) :]:
            raise InputError(f"{name} takes *{parameter.name} and keywords besides: give all arguments by position")
    last = max(index for index, parameter in enumerate(parameters) if parameter.name in given)
    return tuple(given.get(parameter.name, parameter.default) for parameter in parameters[: last + 1])


_COLLECTING = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _flat(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's forward that have a place in the flat tuple, in order."""
    return [p for p in inspect.signature(model.forward).parameters.values() if p.kind not in _COLLECTING]


def by_place_and_name(model: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as those that go by position, and those that can only go by name."""
    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return inputs, {}
    count = sum(p.kind in BY_POSITION for p in parameters)
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(inputs) - count > len(names):
        return inputs, {}  # too many: the call will say so
    return inputs[:count], dict(zip(names, inputs[count:], strict=False))


def call_model(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Call a model, or another function."""
    args, keywords = by_place_and_name(model, inputs)
    return model(*args, **keywords)


def count_collected(model: nn.Module, given: int) -> int:
    """How many of so many arguments go into ``*args``."""
    parameters = inspect.signature(model.forward).parameters.values()
    count = sum(p.kind in BY_POSITION for p in parameters)
    return max(0, given - count) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else 0


def constant_parameters(model: nn.Module, given: int, inputs: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The parameters that are no tensors of a call with so many arguments, with their values.

    These are those that keep their default, and flags among the `inputs`: None, true or false, strings.
    """
    parameters = _flat(model)
    flags = {
        p.name: value
        for p, value in zip(parameters, inputs, strict=False)
        if value is p.default or isinstance(value, bool | str | None)
    }
    return flags | {p.name: p.default for p in parameters[given:] if p.default is not p.empty}
