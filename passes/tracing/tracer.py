"""The tracer: what torch.fx makes of a module's forward, with what the compiler has to know marked in the graph.

Augmented assignments are noted as what they are, and dataclasses as calls of their class. What hooks see is marked
under ``meta["exposed"]``, and what a custom layer gives under ``meta["given_by"]``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _hooks
from torch.nn.modules.conv import _ConvNd

from passes.layers.grouped import Grouped
from passes.layers.known.norms import is_frozen_norm
from passes.tracing.calls import in_place


def join(path: str, name: str) -> str:
    """Join two dotted paths, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


class _Proxy(fx.Proxy):
    """A proxy that notes ``x += y`` as what it is: torch.fx takes it for ``x = x + y``, but others may hold x.

    Attributes that code sets, as in ``weight.data = y``, would be lost: that can't be traced.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node"):
            raise TypeError(f"code sets {name!r} of a tensor")
        super().__setattr__(name, value)

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._augmented(operator.iadd, other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._augmented(operator.isub, other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._augmented(operator.imul, other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._augmented(operator.itruediv, other)

    def _augmented(self, operation: Any, other: object) -> fx.Proxy:
        found: fx.Proxy = self.tracer.create_proxy("call_function", operation, (self, other), {})
        return found


class _Weight(_Proxy):
    """Stands for the weight of a custom layer in its own code, which may ask for what all forms of it have alike."""

    shape: torch.Size
    ndim: int

    def __init__(self, node: fx.Node, tracer: fx.Tracer, weight: Tensor) -> None:
        super().__init__(node, tracer)
        alike = {"shape": weight.shape, "ndim": weight.ndim, "dtype": weight.dtype, "device": weight.device}
        self.__dict__.update(alike)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()


class Tracer(fx.Tracer):
    """A tracer that knows the compiler's leaves, marks what hooks see, and remembers where it failed."""

    failed: str | None = None
    refused: str | None = None  # path of the custom layer that could not be opened
    collected = 0  # how many arguments go into *args

    def __init__(
        self,
        root_path: str = "",
        leaves: Collection[str] = (),
        hooked: Collection[str] = (),
        opening: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        """Take the path of what is traced, and the paths of leaves and hooked modules, and the layers to be opened."""
        super().__init__()  # unpickling a graph module makes a tracer of its graph's class without arguments
        self._root_path, self._leaves, self._hooked, self.opening = root_path, leaves, hooked, opening
        self._weights = {id(layer.weight): path for path, layer in reversed([*opening.items()])}
        self.read_outside: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Besides torch's own modules: subclasses of its layers, grouped layers, frozen norms, and what was named."""
        if join(self._root_path, module_qualified_name) in self._leaves:
            return True
        if module_qualified_name in self.opening:
            return False
        ours = isinstance(m, _ConvNd | nn.Linear | Grouped | torch.jit.ScriptModule) or is_frozen_norm(m)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Call the forward as Python would, whatever it is wrapped in; what is collected in ``*args`` has names too."""
        function, given = inspect.unwrap(root_fn), concrete_args or {}
        signature = inspect.signature(function)
        args: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        for name, parameter in inspect.signature(self.root.forward).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                if not self.collected:
                    raise TypeError(f"its forward takes *{name}: give example_inputs, so that their number is known")
                args += [self.create_proxy("placeholder", f"{name}_{i}", (), {}) for i in range(self.collected)]
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = self._proxy_placeholder(name, given, signature, function)
                if isinstance(keywords[name], fx.Proxy) and not keywords[name].node.args:
                    keywords[name].node.args = (None,)  # in the code of a graph it may stand behind some with a default
            elif parameter.kind is not parameter.VAR_KEYWORD:
                args.append(self._proxy_placeholder(name, given, signature, function))
        return partial(root_fn, **keywords), args

    def create_arg(self, a: Any) -> Any:
        """Note a dataclass as a call of its class with all fields, even one that is a dict (as transformers have)."""
        if is_dataclass(a) and not isinstance(a, type):
            if not isinstance(a, dict) and (hasattr(a, "__post_init__") or not all(field.init for field in fields(a))):
                raise TypeError(f"{type(a).__name__} is a dataclass that computes fields itself")
            values = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
            return self.create_node("call_function", type(a), (), values)
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Note a call in the form that all calls have."""
        args, kwargs = in_place(self.root, kind, target, args, kwargs)
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stand for what a node yields."""
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Stand for a parameter. The own code of a layer that is being opened may ask for the shape of its weight."""
        path = self._weights.get(id(attr_val))
        if path is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if all(path != name for name, _ in self.module_stack.values()):
            self.read_outside.add(path)
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        target = f"{path}.weight"
        if not isinstance(parameter_proxy_cache.get(target), _Weight):
            node = self.create_node("get_attr", target, (), {})
            with torch._C.DisableTorchFunction():  # to look at it is no use of it
                parameter_proxy_cache[target] = _Weight(node, self, attr_val)
        return parameter_proxy_cache[target]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace into a module, or past it if it is a leaf."""
        name = self.path_of_module(m)
        path = join(self._root_path, name)
        try:
            result = super().call_module(m, m.forward if has_global_hooks() else forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost module is the first to know
                self.failed = f"submodule {path!r} ({type(m).__name__})"
            if self.refused is None and name in self.opening:
                self.refused = name
            raise
        if name in self.opening:
            fx.node.map_aggregate(result, lambda x: _add(x, path))
        if path in self._hooked:
            fx.node.map_aggregate((args, kwargs, result), lambda x: _expose(x, path))
        return result


def has_global_hooks() -> bool:
    """Whether hooks are registered for the forwards of all modules there are."""
    return bool(_hooks._global_forward_hooks or _hooks._global_forward_pre_hooks)


def _expose(value: object, path: str) -> None:
    if isinstance(value, fx.Proxy):
        value.node.meta["exposed"] = f"a hook on {path!r}"


def _add(value: object, path: str) -> None:
    if isinstance(value, fx.Proxy):
        value.node.meta["given_by"] = (*value.node.meta.get("given_by", ()), path)
