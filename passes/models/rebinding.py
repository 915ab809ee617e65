"""Rebinding: functions that hold parts of a model are bound to the parts of its copy.

A deep copy takes over functions as they are: a forward that was put on an instance, a hook. One that holds a module or
a tensor of the original (in its closure or its defaults, as the object of a method, in a partial, or in a list of
these) would go on running the original's layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any


def parts_of(value: object) -> list[object]:
    """What a function holds: its closure, its defaults, the object of a method; or what a container does."""
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set | frozenset) else []


def held_by(value: object) -> Iterator[object]:
    """Everything that a function or container holds, itself included, each once."""
    todo, seen = [value], set()
    while todo:
        each = todo.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            todo += parts_of(each)


def rebound(value: Any, twins: Mapping[int, Any], made: dict[int, Any] | None = None) -> Any:
    """The same value with the twin of everything in it that has one; the same object if nothing has.

    Args:
        value: a function, a container of some, or anything else.
        twins: what stands for which object, by the object's id.
        made: what was made before, for functions that hold each other.
    """
    made = {} if made is None else made
    if id(value) in twins:
        return twins[id(value)]
    if id(value) in made:
        return made[id(value)]
    if not any(id(each) in twins for each in held_by(value)):
        return value

    def new(part: Any) -> Any:
        return rebound(part, twins, made)

    if isinstance(value, MethodType):
        return MethodType(new(value.__func__), new(value.__self__))
    if isinstance(value, FunctionType):
        return _function(value, twins, made)
    if isinstance(value, partial):
        keywords = {key: new(each) for key, each in value.keywords.items()}
        twin = type(value)(new(value.func), *map(new, value.args), **keywords)
        twin.__dict__.update({key: new(each) for key, each in value.__dict__.items()})
        return twin
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: new(each) for key, each in value.items()})
        return copied
    return type(value)(map(new, value)) if type(value) in (list, tuple, set, frozenset) else value


def _function(old: FunctionType, twins: Mapping[int, Any], made: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in old.__closure__ or ())
    new = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
    made[id(old)] = new
    for cell, before in zip(cells, old.__closure__ or (), strict=True):
        if before != CellType():
            cell.cell_contents = rebound(before.cell_contents, twins, made)
    new.__defaults__ = rebound(old.__defaults__, twins, made)
    new.__kwdefaults__ = rebound(old.__kwdefaults__, twins, made)
    new.__qualname__, new.__module__ = old.__qualname__, old.__module__
    new.__dict__.update(rebound(old.__dict__, twins, made))
    return new


def globals_of(value: object) -> Iterator[tuple[str, object]]:
    """What the functions in a value know by a global name, which can't be bound anew."""
    for each in held_by(value):
        if isinstance(each, FunctionType):
            yield from ((name, each.__globals__[name]) for name in each.__code__.co_names if name in each.__globals__)
