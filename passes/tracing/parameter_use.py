"""Who uses parameters: a torch function mode that sees every operation which is given one."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.layers.known.layer_call import SAME_FOR_ALL_FORMS


class ParameterWatch(TorchFunctionMode):
    """Notes the parameters of a model that operations use while it is entered.

    In tracing, a layer's own call is one step of the graph and uses nothing; what operations use is read by others,
    also where torch.fx takes it for a constant.

    Args:
        model: the model.
        isolate: whether `model` shares its parameters with other copies: what is used becomes its own before
            that, since an operation may write to it.

    Attributes:
        used: paths of the parameters used.
    """

    def __init__(self, model: nn.Module, *, isolate: bool = False) -> None:
        """Watch the parameters of `model`."""
        super().__init__()
        self.used: set[str] = set()
        self._model, self._isolate = model, isolate
        self._own: dict[int, nn.Parameter] = {}
        self._kept = list(model.parameters())  # while they live, nothing else has their ids
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
                    if self._isolate:
                        args, kwargs = pytree.tree_map_only(nn.Parameter, self._isolated, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _isolated(self, parameter: nn.Parameter) -> nn.Parameter:
        """The model's own copy of a parameter, which has taken its places; others than the model's as they are."""
        paths = self._paths.get(id(parameter), [])
        if paths and id(parameter) not in self._own:
            own = copy.deepcopy(parameter)
            for path in paths:
                holder, _, name = path.rpartition(".")
                self._model.get_submodule(holder)._parameters[name] = own
            self._own.update({id(parameter): own, id(own): own})
            self._paths[id(own)] = paths
        return self._own.get(id(parameter), parameter)
