"""Putting one module in the place of another. Surgery makes a new module and never edits the old one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

# What a torch or masked layer sets on itself; anything else in its __dict__ was put there by the user and moves along.
_ITS_OWN = {
    "transposed",
    "output_padding",
    "groups",
    "_reversed_padding_repeated_twice",
    "in_features",
    "out_features",
    "_mask",
}


_HOOKS = {key for key in nn.Module().__dict__ if "_hooks" in key}


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Register `new` under the module path `path` of `model`, in the place and order of the old module.

    The hooks of the old one move along in their registries, so that the handles which a user holds still remove them.
    """
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    old = holder._modules[name]
    if old is not None:
        new.__dict__.update({key: old.__dict__[key] for key in hook_dicts(old)})
        new._is_full_backward_hook = old._is_full_backward_hook
    holder._modules[name] = new


def shallow_copy(module: nn.Module, kind: type[M]) -> M:
    """A new module of class `kind` with all that another has, in registries of its own."""
    new = kind.__new__(kind)
    registries = ("_parameters", "_buffers", "_modules", *hook_dicts(module))
    new.__dict__.update({key: value.copy() if key in registries else value for key, value in module.__dict__.items()})
    return new


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` what `old` has beside its weights: mode, hooks (the same callables) and the user's own attributes."""
    new.training = old.training
    carry_hooks(old, new)
    for key, value in old.__dict__.items():
        if key not in new.__dict__ and key not in _ITS_OWN:
            new.__dict__[key] = value


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Register the hooks of `old` on `new` by reference, in place of what `new` has."""
    for key in hook_dicts(old):
        new.__dict__[key] = old.__dict__[key].copy()
    new._is_full_backward_hook = old._is_full_backward_hook


def hook_dicts(module: nn.Module) -> list[str]:
    """Names of the attributes in which a module keeps its hooks; others that are called so are its own."""
    return [key for key in module.__dict__ if key in _HOOKS]
