"""The names of the zoo: which builder makes which model, and which options it takes."""

from __future__ import annotations

import builtins
import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

B = TypeVar("B", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str) -> Callable[[B], B]:
    """Enter the decorated class or function, whose calls return a model, under `name`; its parameters are the options.

    Raises:
        ValueError: if the name is taken: a later builder never silently replaces an earlier one.
    """

    def enter(builder: B) -> B:
        if name in _BUILDERS:
            raise ValueError(f"the zoo already has a model named {name!r}; register the new one under another name")
        _BUILDERS[name] = builder
        return builder

    return enter


def list() -> builtins.list[str]:
    """Names of all models that `create` knows, sorted.

    >>> list()[:3]
    ['densenet121_cifar', 'densenet201', 'densenet_bc']
    """
    return sorted(_BUILDERS)


def create(name: str, **options: Any) -> nn.Module:
    """Create a model of the zoo with random weights, in training mode, on the CPU.

    Args:
        name: one of `list()`.
        **options: ``num_classes`` for all. ``in_channels`` (of the input image) for the CIFAR networks and ``lenet5``.
            ``depth`` (layers with weights, 6·n + 4) and ``growth`` (channels that a layer adds) for ``densenet_bc``.
            ``resnet50`` and ``densenet201`` pass theirs on to torchvision.

    Returns:
        A model that turns images ``[N, in_channels, H, W]`` into class scores (logits) ``[N, num_classes]``.

    Raises:
        ValueError: for an unknown name or option, or a value that an option can't have.

    >>> sum(p.numel() for p in create("lenet5").parameters())
    61706
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        near = difflib.get_close_matches(str(name).lower(), _BUILDERS)
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"there is no model named {name!r}{meant} The zoo has: {', '.join(sorted(_BUILDERS))}")
    parameters = inspect.signature(builder).parameters.values()
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        check_options(name, options, (parameter.name for parameter in parameters))
    return builder(**options)


def check_options(name: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Refuse, with a ValueError, options `given` for the model `name` that are not among the `accepted` ones."""
    accepted = sorted(accepted)
    unknown = [option for option in given if option not in accepted]
    if unknown:
        options = f"option{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}"
        raise ValueError(f"{name} has no {options}; it accepts: {', '.join(accepted)}")


def check_count(option: str, value: object) -> None:
    """Refuse, with a ValueError, a `value` of `option` that is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{option} must be a whole number of at least 1, given {value!r}")
