"""Copies: of a model a faithful one to rewrite and a throw-away one to run or trace, and of its inputs.

Hooks are never deep-copied (that would copy a user's tap object, or fail on an activation it holds): the faithful copy
gets the same callables by reference, the throw-away one gets none. A function on a module, or a hook, that holds parts
of the model (a method of one of its modules, a closure over its layers) is bound to their twins, or the copy would go
on running the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.layers.plain_weights import removal_of
from passes.layers.surgery import carry_hooks, hook_dicts
from passes.models.rebinding import globals_of, rebound
from passes.models.values import mapped

M = TypeVar("M", bound=nn.Module)


def copy_model(model: M, *, shared: Iterable[Tensor] = ()) -> M:
    """Return a deep copy of `model`: same class, modes, attributes and values; hooks by reference.

    Args:
        model: any module.
        shared: tensors that are not worth a copy, since they will be replaced: the copy holds the same objects.

    Raises:
        InputError: a module holds something that can't be copied, such as a tensor with a gradient history.
    """
    twin = _deepcopy(model, {id(tensor): tensor for tensor in shared})
    twins = twins_of(model, twin)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        carry_hooks(module, other)
        for key in hook_dicts(other):
            hooks = other.__dict__[key]
            for handle, hook in hooks.items():
                hooks[handle] = _rebound(hook, twins)
    return twin


def unhooked_copy(model: M, twin: M | None = None) -> M:
    """Return a deep copy of `model` without hooks, to be run or worked on in place of the live model.

    Whatever a forward does to parameters and buffers stays in the copy. With a `twin`, a copy that was made before, the
    new one shares the parameters of that.
    """
    parameters = () if twin is None else zip(model.parameters(), twin.parameters(), strict=True)
    made = _deepcopy(model, {id(theirs): own for theirs, own in parameters})
    for module in made.modules():  # models of transformers note that they have hooked themselves, in their first call
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return made


def copy_inputs(inputs: Any) -> Any:
    """Return inputs that a model may work on in place: every tensor in them is a new one, without history."""
    return mapped(inputs, lambda x: x.detach().clone())


def _deepcopy(model: M, memo: dict[int, Any]) -> M:
    for module in model.modules():
        memo.update((id(module.__dict__[key]), type(module.__dict__[key])()) for key in hook_dicts(module))
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(_culprit(model, memo) or f"{type(model).__name__} can't be copied: {error}") from error
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if not theirs.is_leaf:  # of TorchScript, which copies with a gradient history
            theirs.detach_().requires_grad_(mine.requires_grad)
    _rebind(twin, twins_of(model, twin))
    return twin


def twins_of(model: nn.Module, twin: nn.Module) -> dict[int, Any]:
    """The copies of all modules, parameters and buffers, by the ids of the originals."""
    pairs: list[tuple[Any, Any]] = list(zip(model.modules(), twin.modules(), strict=True))
    for module, other in list(pairs):
        for mine, theirs in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            pairs += [(tensor, theirs[name]) for name, tensor in mine.items() if tensor is not None]
    return {id(mine): theirs for mine, theirs in pairs}


def _rebind(twin: nn.Module, twins: dict[int, Any]) -> None:
    """Bind the functions that stand on the modules of a copy to its own parts."""
    for path, module in twin.named_modules():
        held = ("_parameters", "_buffers", "_modules", *hook_dicts(module))
        for key, value in [item for item in module.__dict__.items() if item[0] not in held]:
            for name, part in globals_of(value):
                if id(part) in twins:
                    raise InputError(
                        f"module {path!r} ({type(module).__name__}) can't be copied: a function on it, {key!r}, reads "
                        f"the global {name!r}, which is a part of the model, and the copy would go on running it. "
                        "Write it as a method of a subclass"
                    )
            module.__dict__[key] = rebound(value, twins)


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str | None:
    """Name the module and the attribute that can't be copied."""
    inside = {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, {**memo, **inside})
            except Exception as error:
                let_memory_errors_pass(error)
                where = f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
                if (removal := removal_of(module)) is not None:
                    return f"{where} computes its {key} by a hook, which can't be copied: remove it with {removal}"
                return (
                    f"{where} holds {key!r} ({type(value).__name__}), which can't be copied: {error} "
                    "Delete it before compiling, or keep a detached tensor there"
                )
    return None


def _rebound(hook: Any, twins: dict[int, Any]) -> Any:
    # Hooks around load_state_dict sit in a wrapper that holds their module.
    owner = getattr(hook, "module", None)
    if getattr(hook, "with_module", False) and callable(owner) and id(owner()) in twins:
        return type(hook)(hook.hook, twins[id(owner())])
    return rebound(hook, twins)
