"""Values taken apart: the tensors in what models are given and what they give, wherever they stand.

Known are tuples, lists, dicts, named tuples, dataclasses field by field, and what is registered with torch's pytree;
all of them nested. Anything else is a leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.errors import InputError

T = TypeVar("T")
Plain: TypeAlias = bool | int | str | bytes | Enum | torch.dtype | torch.device | None


def leaves(value: object, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a value with its place in it, such as ``output[0].boxes`` for the place ``output``."""
    parts = _parts(value)
    if parts is None:
        yield place, value
    for name, part in parts or ():
        yield from leaves(part, place + name)


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in a value, in order."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def shapes_of(value: object) -> str:
    """The shapes of all tensors in a value, for messages."""
    return ", ".join(str(list(x.shape)) for x in tensors_in(value)) or "without tensors"


def mapped(value: T, change: Callable[[Tensor], Any]) -> T:
    """A copy of a value with every tensor changed; leaves that are no tensors are the same objects."""
    made: T = pytree.tree_map(lambda leaf: _mapped_leaf(leaf, change), value)
    return made


def plain(value: Any) -> Any:
    """A value in dicts, tuples and lists alone: a dataclass becomes a dict of its fields that are not None."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name, None) for field in fields(value)}
        return {name: plain(part) for name, part in parts.items() if part is not None}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return list(map(plain, value)) if isinstance(value, list) else value


def give_plain_outputs(model: nn.Module) -> None:
    """Let `model` give its outputs in dicts, tuples and lists, in place: a file can't hold the classes of others."""
    forward = model.forward

    @wraps(forward)
    def plain_forward(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = plain_forward


def comparable(value: object, place: str) -> dict[str, Tensor | Plain]:
    """The leaves of a value by place: dense tensors, floating-point numbers as tensors, and what is compared as it is.

    Raises:
        InputError: there is something else in it; says where, and of what type it is.
    """
    return {where: _comparable_leaf(leaf, where) for where, leaf in leaves(value, place)}


def _parts(value: object) -> list[tuple[str, Any]] | None:
    """What a value consists of, each part with the place that it has in it; None if it is a leaf."""
    if isinstance(value, Tensor | Plain | type):
        return None
    if is_dataclass(value):  # which may be a dict besides, as the outputs of transformers are
        names = [field.name for field in fields(value)]
        items: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {}
        rest = [(f"[{key!r}]", part) for key, part in items.items() if key not in names]
        return [(f".{name}", getattr(value, name, None)) for name in names] + rest
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple | list):
        named = getattr(value, "_fields", None)
        return [(f"[{i}]" if named is None else f".{named[i]}", part) for i, part in enumerate(value)]
    known = pytree.SUPPORTED_NODES.get(type(value))
    parts = [] if known is None else known.flatten_fn(value)[0]
    return [(f"[{i}]", part) for i, part in enumerate(parts)] or None  # a registered constant has no parts


def _mapped_leaf(leaf: Any, change: Callable[[Tensor], Any]) -> Any:
    """What `mapped` makes of a tensor, and of a dataclass or mapping that torch's pytree does not take apart."""
    if isinstance(leaf, Tensor):
        return change(leaf)
    names = [field.name for field in fields(leaf)] if is_dataclass(leaf) and not isinstance(leaf, type) else []
    keys = list(leaf) if isinstance(leaf, MutableMapping) else []
    twin = copy.copy(leaf) if names or keys else leaf
    for name in names:
        if hasattr(leaf, name):
            object.__setattr__(twin, name, mapped(getattr(leaf, name), change))  # it may be frozen
    for key in keys:
        twin[key] = mapped(leaf[key], change)
    return twin


def _comparable_leaf(leaf: Any, place: str) -> Tensor | Plain:
    if isinstance(leaf, float | complex):
        return torch.tensor(leaf, dtype=torch.complex128 if isinstance(leaf, complex) else torch.float64)
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_quantized:
        return leaf
    if isinstance(leaf, Tensor):
        kind = "nested" if leaf.is_nested else "quantized" if leaf.is_quantized else "sparse"
        raise InputError(f"{place} is a {kind} tensor, which can't be compared: let the model return a dense one")
    if isinstance(leaf, Plain):
        return leaf
    raise InputError(
        f"{place} is a {type(leaf).__name__}, which can't be taken apart: let the model return tensors, numbers and "
        "strings, in tuples, lists, dicts or dataclasses"
    )
