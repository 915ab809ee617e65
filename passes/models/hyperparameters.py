"""Hyperparameters: the attributes by which modules of one class compute different things with equal tensors.

Torch's and torchvision's own modules keep nothing but hyperparameters in their public attributes: all of these count.
A class of anyone else's also keeps counters, paths and options of its training. Of these the attributes count that the
model's forwards read (`forward_names.py`). What is never read (an epoch, a path, ``pretrained``) doesn't count, nor
what a forward sets itself (a counter, a cache), the mode, the device and the dtype.

Values are made plain data: numbers, strings and containers as they are, functions, classes and members of enumerations
by name, tensors that are neither parameters nor buffers by weighted means, other objects by their own attributes.
"""

from __future__ import annotations

import enum
import functools
import math
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.layers.custom import dense_class
from passes.models.forward_names import forward_names, is_library, variables

_BOOKKEEPING = {*vars(nn.Module()), "device", "dtype", "_device", "_dtype"}
_DEPTH = 6  # of containers and objects inside each other
_NOTHING: Any = object()


class Hyperparameters:
    """Finds the hyperparameters of a model's modules, by a look at the code of all their classes."""

    def __init__(self, model: nn.Module) -> None:
        """Read the code of the classes of `model`; nothing of it is run."""
        modules = list(model.modules())
        self._registered = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        held = {type(x) for module in modules for x in vars(module).values() if _is_object(x)}
        kinds = {*map(dense_class, modules), *held}
        self._read = forward_names(frozenset(kind for kind in kinds if not is_library(kind))).read

    def of(self, module: nn.Module, kind: type | None = None) -> dict[str, Any]:
        """The hyperparameters of `module` as plain data, public names first; `kind` stands in for its class."""
        return self._of(module, kind or type(module), 0)

    def _of(self, holder: object, kind: type, depth: int) -> dict[str, Any]:
        own = forward_names(frozenset([kind]))
        read = own.read | self._read
        values = {name: value for name, value in _class_constants(kind).items() if name in read} | vars(holder)
        found: dict[str, Any] = {}
        for name, value in sorted(values.items(), key=lambda item: (item[0].startswith("_"), item[0])):
            container = isinstance(value, list | dict | set)
            if name in _BOOKKEEPING or name in own.written or (container and (name in own.changed or not value)):
                continue  # an empty container is a cache or a record that nothing was put into yet
            if name in read or (is_library(kind) and not name.startswith("_")):
                plain = self._plain(value, depth + 1)
                if plain is not _NOTHING and not _is_object(value):
                    found[name] = plain
                elif plain is not _NOTHING:
                    found |= {name: type(value).__qualname__, **{f"{name}.{key}": each for key, each in plain.items()}}
        return found

    def _plain(self, value: Any, depth: int) -> Any:
        """A value fit for JSON that is equal to another's where the two mean the same; `_NOTHING` if there is none."""
        if isinstance(value, enum.Enum):
            return str(value)
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, complex | bytes | range | slice):
            return repr(value)
        if depth > _DEPTH:
            return _NOTHING
        if isinstance(value, functools.partial):
            return self._plain([value.func, value.args, value.keywords], depth)
        if isinstance(value, tuple | list):
            return [self._inner(item, depth) for item in value]
        if isinstance(value, set | frozenset):
            return sorted((self._inner(item, depth) for item in value), key=repr)
        if isinstance(value, dict):
            return {str(key): self._inner(item, depth) for key, item in value.items()}
        if isinstance(value, FunctionType) and (inside := variables(value)):
            return [value.__qualname__, {name: self._inner(item, depth) for name, item in inside.items()}]
        if isinstance(value, FunctionType | BuiltinFunctionType | MethodType | type):
            return value.__qualname__
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value.copy())
        if isinstance(value, Tensor):
            return _sums(value) if id(value) not in self._registered else _NOTHING
        return self._of(value, type(value), depth) if _is_object(value) else _NOTHING

    def _inner(self, item: object, depth: int) -> Any:
        plain = self._plain(item, depth + 1)
        return f"<{type(item).__qualname__}>" if plain is _NOTHING else plain


def _class_constants(kind: type) -> dict[str, Any]:
    """Plain attributes of a class, which an instance may have otherwise."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not nn.Module:
            plain = {k: v for k, v in vars(base).items() if v is None or isinstance(v, int | float | str | tuple)}
            found |= {name: value for name, value in plain.items() if not name.startswith("__")}
    return found


def agree(one: Any, other: Any) -> bool:
    """Whether two values are the same, but for the last digits of numbers: machines round logarithms differently."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_object(value: object) -> bool:
    """Whether a value is a holder of attributes, such as a box coder or a dataclass of settings."""
    others: Any = nn.Module | Tensor | np.ndarray | type | FunctionType | MethodType | ModuleType | enum.Enum
    containers: Any = dict | list | tuple | set | functools.partial
    return hasattr(value, "__dict__") and not isinstance(value, others | containers)


def _sums(tensor: Tensor) -> Any:
    """What stands for a tensor: its shape, and weighted means of what is above and below 0."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or isinstance(tensor, nn.Parameter):
        return _NOTHING
    values = tensor.detach().cpu().reshape(-1)
    values = (torch.view_as_real(values).reshape(-1) if values.is_complex() else values).double().nan_to_num()
    weighted = values * torch.linspace(1, 2, len(values), dtype=torch.float64)
    sums = (float(part.sum()) for part in (weighted.relu(), (-weighted).relu()))
    return [list(tensor.shape), *(each / max(len(values), 1) for each in sums)]
