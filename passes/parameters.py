"""Who uses parameters: a torch function mode that sees every operation which is given one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Attributes that a regrouped layer's parameter has in common with the dense one's.
SAME_FOR_ALL_FORMS = {"dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "is_quantized"}


class ParameterWatch(TorchFunctionMode):
    """Notes the parameters of a model that operations use while it is entered.

    In tracing, a layer's own call is one step of the graph and uses nothing; what operations use is read by others,
    also where torch.fx takes it for a constant.

    Attributes:
        used: paths of the parameters used.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch the parameters of `model`."""
        super().__init__()
        self.used: set[str] = set()
        self._paths: dict[int, list[str]] = {}
        for path, parameter in model.named_parameters(remove_duplicate=False):
            self._paths.setdefault(id(parameter), []).append(path)

    def note(self, paths: list[str], operation: str) -> None:
        """An operation uses the parameter that has these paths."""
        self.used.update(paths)

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See what an operation is given, and do it."""
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute not in SAME_FOR_ALL_FORMS:
            for value in pytree.tree_leaves((args, kwargs)):
                if (paths := self._paths.get(id(value))) is not None:
                    self.note(paths, attribute or getattr(func, "__name__", repr(func)))
        return func(*args, **(kwargs or {}))
