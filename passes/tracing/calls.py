"""Calls in one form: arguments that may stand by position do, however the model's code gives them.

``self.conv(input=x)``, ``torch.cat(tensors=…, dim=1)`` and ``x.mean(axis=1)`` are noted like ``self.conv(x)``,
``torch.cat(…, 1)`` and ``x.mean(1)``, so that no pass has to think of keywords. An argument behind one that is not
given keeps its keyword, and so do those that have no place (``alpha=``, ``dtype=``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import boolean_dispatched
from torch.fx.operator_schemas import _torchscript_schema_to_signature, get_signature_for_torch_op

from passes.layers.known.as_torch_made_it import change_of

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_OF_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def in_place(root: nn.Module, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of a call in a graph, by position as far as they can be; `root` has the modules that are called."""
    found = (by_position(each, args, kwargs) for each in _signatures(root, kind, target)) if kwargs else ()
    return next((call for call in found if call is not None), (args, kwargs))


def by_position(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The same arguments, by position as far as they can be; None if the signature does not take them.

    >>> by_position(inspect.signature(lambda x, y=0, *, z=0: x), (), {"z": 1, "x": 2})
    ((2,), {'z': 1})
    """
    known = signature.parameters
    rest = {name if name in known else _OF_NUMPY.get(name, name): value for name, value in kwargs.items()}
    try:
        signature.bind(*args, **rest)
    except TypeError:
        return None
    places = [parameter for parameter in known.values() if parameter.kind in _BY_PLACE]
    for parameter in places[len(args) :]:
        if parameter.name not in rest:
            break
        args = (*args, rest.pop(parameter.name))
    return args, rest


def _signatures(root: nn.Module, kind: str, target: Any) -> Iterator[inspect.Signature]:
    """How what is called takes its arguments; nothing of a user's function, or a module that was changed."""
    if kind == "call_module":
        module = root.get_submodule(target)
        if change_of(module) is None:
            yield inspect.signature(module.forward)
    elif kind == "call_method":
        yield from _of_method(target)
    elif kind == "call_function":
        yield from _of_function(target)


def _of_function(function: Any) -> Iterator[inspect.Signature]:
    if function in boolean_dispatched:
        yield inspect.signature(boolean_dispatched[function]["if_false"])
    elif isinstance(function, FunctionType):
        if function.__module__.partition(".")[0] in ("torch", "torchvision"):
            yield inspect.signature(function)
    else:
        yield from get_signature_for_torch_op(function) or ()


def _of_method(name: str) -> Iterator[inspect.Signature]:
    method = getattr(Tensor, name, None)
    if isinstance(method, FunctionType):
        yield inspect.signature(method)
    elif method is not None:
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
            yield _torchscript_schema_to_signature(schema)
