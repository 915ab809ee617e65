"""Weights that a hook computes before every call: what has put the hook there, and how to be rid of it."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def removal_of(module: nn.Module) -> str | None:
    """The call that makes a weight of `module` a plain parameter, in words; None if no hook of torch computes any."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            return "torch.nn.utils.remove_weight_norm(module)"
        if isinstance(hook, SpectralNorm):
            return "torch.nn.utils.remove_spectral_norm(module)"
        if isinstance(hook, prune.BasePruningMethod):
            return f"torch.nn.utils.prune.remove(module, {hook._tensor_name!r})"
    return None
