"""Which attributes the forwards of classes read and set: found in their compiled code, of which nothing is run.

Looked at are the forward itself and all methods, properties and functions that it mentions, and those that these do. A
name counts as read wherever it is looked up, on whichever object, or stands as a string (``getattr(self, "scale")``).
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ROOTS = {"forward", "__call__", "__getitem__", "__getattr__"}
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_CHANGING = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "popitem"}
_CHANGING |= {"remove", "discard", "clear", "sort", "reverse"}


@dataclass
class Names:
    """Attributes that code reads, sets (``self.x = …``), changes if they are containers, and the globals it uses."""

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def include(self, other: Names) -> None:
        """Add the names of another."""
        self.read |= other.read
        self.written |= other.written
        self.changed |= other.changed
        self.used |= other.used


def is_library(kind: type | FunctionType) -> bool:
    """Whether a class or function is torch's, torchvision's or this package's."""
    return (kind.__module__ or "").partition(".")[0] in ("torch", "torchvision", "passes")


@functools.cache
def forward_names(kinds: frozenset[type]) -> Names:
    """The names in the forwards of some classes, and in all that these call."""
    found = Names(read=set(_ROOTS))
    done: set[FunctionType] = set()
    pending = _new_methods(kinds, found, done)
    while pending:
        function = pending.pop()
        if function not in done:
            done.add(function)
            names = _names(function.__code__)
            found.include(names)
            used = (each for name in names.used for each in _functions(function.__globals__.get(name)))
            pending += [each for each in used if not is_library(each)]
        if not pending:  # names that were found may be those of more methods
            pending = _new_methods(kinds, found, done)
    return found


def _new_methods(kinds: Iterable[type], found: Names, done: Collection[FunctionType]) -> list[FunctionType]:
    """The methods of some classes that have one of the names found, and were not looked at yet."""
    return [each for kind in kinds for each in _methods(kind, found.read) if each not in done]


def variables(function: FunctionType) -> dict[str, Any]:
    """What a function took from the code around it, by name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found


def _methods(kind: type, names: Iterable[str]) -> Iterator[FunctionType]:
    """The functions that a class has under some of these names, inherited ones too; torch's Module says nothing."""
    for base in kind.__mro__:
        if base is not nn.Module:
            for name in vars(base).keys() & names:
                yield from _functions(vars(base)[name])


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions behind a method, a property or a wrapper."""
    value = value.fget if isinstance(value, property) else value
    value = value.func if isinstance(value, functools.partial | functools.cached_property) else value
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType):
        yield value
        yield from (inner for inner in variables(value).values() if isinstance(inner, FunctionType))


@functools.cache
def _names(code: CodeType) -> Names:
    """The names in a piece of compiled code and in what is defined inside it."""
    found = Names()
    steps = list(dis.get_instructions(code))
    for index, step in enumerate(steps):
        value = step.argval
        if step.opname in _LOADS:
            found.read.add(value)
            if _changes_it(steps[index + 1 : index + 4]):
                found.changed.add(value)
        elif step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            found.written.add(value)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.used.add(value)
        elif isinstance(value, CodeType):
            found.include(_names(value))
        elif step.opname in ("LOAD_CONST", "RETURN_CONST"):
            items = value if isinstance(value, tuple) else (value,)
            found.read.update(item for item in items if isinstance(item, str))
    return found


def _changes_it(following: list[dis.Instruction]) -> bool:
    """Whether what was just loaded is changed by a method, as in ``x.append``, or by setting an item of it."""
    first, second, third = ([step.opname for step in following] + [""] * 3)[:3]
    if first in _LOADS:
        return following[0].argval in _CHANGING
    single = first.startswith("LOAD_") and not isinstance(following[0].argval, tuple)
    return single and (second in ("STORE_SUBSCR", "DELETE_SUBSCR") or (second, third) == ("COPY", "COPY"))
