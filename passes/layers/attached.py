"""What rides on modules: values of ours that go where a module goes.

A value stands in the module's ``__dict__`` under one key of its kind, and is neither parameter, buffer nor module. So
it survives `deepcopy`, pickling and surgery around the module, and no state dict has it. Whoever puts another module in
the place of one decides what rides on the new one.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")
_PREFIX = "_sgfx_"


class Attached(Generic[T]):
    """Values of one kind on modules, of which each has one or none.

    Args:
        name: of the kind. Pickles know it: it stays.
        kind: its class.

    >>> colour, module = Attached("colour", str), nn.Linear(1, 1)
    >>> colour.put(module, "red")
    >>> colour.of(module), colour.of(nn.Linear(1, 1))
    ('red', None)
    """

    def __init__(self, name: str, kind: type[T]) -> None:
        """Nothing has such a value yet."""
        self._key, self._kind = f"{_PREFIX}{name}", kind

    def put(self, module: nn.Module, value: T) -> None:
        """Let `module` have this value, in place of an earlier one."""
        module.__dict__[self._key] = value

    def take_off(self, module: nn.Module) -> None:
        """Take the value of `module` away, if it has one."""
        module.__dict__.pop(self._key, None)

    def of(self, module: nn.Module) -> T | None:
        """The value of `module`, or None if it has none."""
        value = module.__dict__.get(self._key)
        return value if isinstance(value, self._kind) else None

    def all_in(self, model: nn.Module) -> dict[str, T]:
        """The values of all modules of `model`, by module path in the order of ``model.named_modules()``."""
        found = ((path, self.of(module)) for path, module in model.named_modules())
        return {path: value for path, value in found if value is not None}


def all_attached(module: nn.Module) -> dict[str, Any]:
    """Whatever rides on a module, by key, to be put into the ``__dict__`` of another."""
    return {key: value for key, value in module.__dict__.items() if key.startswith(_PREFIX)}
