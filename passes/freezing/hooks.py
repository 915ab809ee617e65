"""Hooks: a frozen form has none, so a model in which a hook changes something is not frozen.

Whether one does can't be read off: copies of the hooks, with copies of all that they hold, are run once on a copy of
the model. A hook changes something if it returns something, or works in place on a tensor that it sees. Feature taps
do neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from passes.errors import InputError, let_memory_errors_pass
from passes.infra.random_state import seed_all
from passes.layers.plain_weights import removal_of
from passes.models.copying import copy_inputs, twins_of, unhooked_copy
from passes.models.rebinding import held_by, rebound
from passes.models.values import shapes_of, tensors_in
from passes.options.arguments import call_model
from passes.tracing.tracer import has_global_hooks

FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, ModuleType, type)
KINDS = (("_forward_pre_hooks", "forward pre-hook"), ("_forward_hooks", "forward hook"))


def check_hooks(model: nn.Module, inputs: tuple[object, ...]) -> None:
    """Refuse a model that does not compute in eval mode, for `inputs`, what it would without its hooks.

    Raises:
        InputError: a hook changes something, or it can't be told whether one does.
    """
    if has_global_hooks():
        raise InputError("a frozen form has no hooks, and one is registered for all modules there are: remove it first")
    if not any(module.__dict__[kind] for module in model.modules() for kind, _ in KINDS):
        return
    twin = unhooked_copy(model).eval()
    twins = twins_of(model, twin)
    changing: list[str] = []
    for (path, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        for kind, name in KINDS:
            for key, hook in module.__dict__[kind].items():
                mine = _isolated(hook, twins, f"a {name} on {path!r}")
                _register(other, module, kind, key, partial(_watched, mine, changing, f"a {name} on {path!r}"))
    seed_all(0)
    try:
        with torch.no_grad():
            call_model(twin, copy_inputs(inputs))
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(f"example_inputs of shape {shapes_of(inputs)} do not fit the model: {error}") from error
    if changing:
        raise InputError(
            f"a frozen form has no hooks, and {changing[0]} changes what the model computes: remove it, or write what "
            "it does into the model's forward"
        )


def check_weights(model: nn.Module) -> None:
    """Refuse layers whose weight is computed by a hook: it may be stale now, and a frozen model has no hooks."""
    for path, module in model.named_modules():
        parametrized, layer = is_parametrized(module), isinstance(module, _ConvNd | nn.Linear)
        if removal_of(module) is not None or (layer and "weight" not in module._parameters and not parametrized):
            raise InputError(
                f"the weight of layer {path!r} is computed by a hook (weight_norm, spectral_norm, prune): make it a "
                "plain parameter first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
            )


def _watched(hook: Callable[..., Any], changing: list[str], where: str, module: nn.Module, *seen: Any) -> Any:
    """Run a hook, and note whether it changes something."""
    before = list(_versions(seen))
    result = hook(module, *seen)
    if result is not None or before != list(_versions(seen)):
        changing.append(where)
    return result


def _versions(values: object) -> Iterator[tuple[int, int]]:
    return ((id(tensor), tensor._version) for tensor in tensors_in(values))


def _register(twin: nn.Module, module: nn.Module, kind: str, key: int, hook: Callable[..., Any]) -> None:
    keywords = key in module.__dict__[f"{kind}_with_kwargs"]
    if kind == "_forward_pre_hooks":
        twin.register_forward_pre_hook(hook, with_kwargs=keywords)
    else:
        always = key in module.__dict__["_forward_hooks_always_called"]
        twin.register_forward_hook(hook, with_kwargs=keywords, always_call=always)


def _isolated(hook: Any, twins: dict[int, Any], where: str) -> Any:
    """A copy of a hook that shares nothing with it but code and global names."""
    copies = dict(twins)
    held = [each for each in held_by(hook) if not isinstance(each, FUNCTIONS)]
    for tensor in held_by([held, *(vars(each) for each in held if hasattr(each, "__dict__"))]):
        if isinstance(tensor, Tensor):  # which may have a history, and could not be copied then
            copies.setdefault(id(tensor), tensor.detach().clone())
    try:
        for each in held:
            if id(each) not in copies:
                copies[id(each)] = copy.deepcopy(each, dict(copies))
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"a frozen form has no hooks, and it can't be told whether {where} changes something, since what it holds "
            f"can't be copied ({error}): remove it"
        ) from error
    return rebound(hook, copies)
