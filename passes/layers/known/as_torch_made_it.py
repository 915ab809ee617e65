"""Whether a module still computes what its class says, so that a rewrite may go by the class.

1. Nothing that its class computes with was replaced on the instance: its ``forward`` (as accelerate's hooks do), a
   method that the forward calls (``_conv_forward``), or what calls the forward.
2. Its parameters are the ones that its class registers: none is parametrized, or set by a hook as a plain tensor.
3. The classes of torch and of this package that it is made from were not patched.

Attributes that a forward reads when it is called (``eps``, ``p``, ``stride``) may have any value. What hooks do is
another question: compiled models keep them, and what they see is marked as exposed.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from types import FunctionType

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_MAKERS = ("torch", "torchvision", "passes")
_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "forward")
_COMPUTING = (*_CALLING, "_conv_forward", "_check_input_dim", "__getattr__")


def change_of(module: nn.Module) -> str | None:
    """Say what was changed about a module, of any class, since its class made it; None if nothing was."""
    for name in module.__dict__:
        if name in _CALLING or (_is_method(type(module), name) and not hasattr(nn.Module, name)):
            return f"its {name} was replaced on the instance"
    if is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    for kind in type(module).__mro__:
        own, package = vars(kind), _maker(kind)
        if package not in _MAKERS:  # what users write in their classes is theirs
            continue
        for name in _COMPUTING:
            if name in own and not _comes_from(package, own[name]):
                return f"{kind.__name__}.{name} was replaced"
    tensor = next((name for name, value in module.__dict__.items() if isinstance(value, Tensor)), None)
    if tensor is not None and _maker(type(module)) == "torch":
        return f"its {tensor} is computed (weight_norm, spectral_norm, prune)"
    return None


def is_as_torch_made_it(module: nn.Module) -> bool:
    """Whether a module is of a class of torch, of torchvision or of this package, and nothing was changed about it."""
    return _maker(type(module)) in _MAKERS and change_of(module) is None


def _maker(kind: type) -> str:
    """The package that a class comes from."""
    return kind.__module__.partition(".")[0]


def _is_method(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), FunctionType)


@lru_cache(maxsize=4096)
def _comes_from(package: str, method: object) -> bool:
    """Whether a method was written in a package."""
    folder = Path(str(sys.modules[package].__file__)).parent
    return isinstance(method, FunctionType) and method.__code__.co_filename.startswith(f"{folder}{os.sep}")
