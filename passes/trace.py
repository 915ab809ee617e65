"""Tracing: how the compiler understands a model, as torch.fx graphs.

1. A model has two graphs, eval and train; one whose modules are in mixed modes (norms frozen in eval) has a third. A
   fact about a layer holds only if it holds in all of them.
2. The live model is never touched, even by a forward that writes to its parameters: what is traced are shadows, with
   parameters of their own and no hooks. What a module with hooks takes and gives is marked under ``meta["exposed"]``.
3. torch's layers are leaves, and so are the compiler's own and those that the user names. Subclasses of torch's layers
   are opened where their code allows it (`passes.opening`), else leaves too.
4. Arguments that have a default keep it, unless example inputs give them a value.
5. Calls are in one form (`calls`), whatever is given by keyword.
6. Shapes come from fake tensors, never from running the model; every node of the eval graph has them under
   ``meta["val"]`` where example inputs were given.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _hooks
from torch.nn.modules.conv import _ConvNd

from passes.as_torch_made_it import change_of
from passes.calls import in_place
from passes.copying import unhooked_copy
from passes.errors import InputError
from passes.facts import Region
from passes.layers.grouped import Grouped
from passes.norms import is_frozen_norm
from passes.opening import (
    UNTRACEABLE,
    as_they_are,
    closed_from_the_start,
    custom_layers,
    open_layers,
    replaced,
    traceable,
)
from passes.parameters import ParameterWatch
from passes.python_names import make_callable
from passes.random_state import own_random_state
from passes.shapes import forget_shapes, propagate_shapes

RUNNING_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UntraceableError(InputError):
    """torch.fx can't trace a module as a whole. Its message says why, and `why` says it in one line."""

    why: str


def trace(model: nn.Module, example_inputs: tuple[object, ...] | None = None) -> Region:
    """Trace the whole `model` in eval and train mode (and in its own, where that is mixed).

    Args:
        model: any module; it is neither run nor changed.
        example_inputs: positional arguments of its forward, to compute shapes with; None leaves shapes out.

    Raises:
        UntraceableError: (an InputError) torch.fx can't trace it whole.
        InputError: the example inputs do not fit it.
    """
    return Tracing(model).whole(example_inputs)


def calls(regions: Iterable[Region]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield each call of a module, in order of execution: the graph's mode, the module's path, and the module."""
    for region in regions:
        for mode, graph in region.graphs.items():
            for node in graph.graph.nodes:
                if node.op == "call_module":
                    yield mode, region.module_path(node), graph.get_submodule(str(node.target))


class Tracing:
    """Traces a model or parts of it, on shadows of it: one for each mode.

    Args:
        model: the live model; it is neither run nor changed.
        leaf_modules: paths of modules that are not to be traced into.

    Attributes:
        shadows: mode to shadow. They share parameters, until one of them writes to some.
        hooked: paths of the modules with hooks around their forward or backward. The shadows have none, and what
            hooks do to shapes is not known: example inputs that do not fit the shadows may fit the model.
        closed: paths of the custom layers that stay leaves, with the reason where their weight is not used as it is.
    """

    def __init__(self, model: nn.Module, leaf_modules: Collection[str] = ()) -> None:
        """Make the shadows."""
        if "forward" in model.__dict__:
            raise InputError(
                f"{type(model).__name__}.forward was replaced on the instance; put it back before compiling"
            )
        self._leaves = frozenset(leaf_modules)
        everywhere = has_global_hooks()
        self.hooked = {
            path
            for path, module in model.named_modules()
            if everywhere or any(module.__dict__.get(key) for key in RUNNING_HOOKS)
        }
        self.closed = closed_from_the_start(model)
        self._model = model
        self.shadows: dict[str, nn.Module] = {}
        for mode in _modes(model):
            self.shadows[mode] = self.copy_in(mode, self.shadows.get("eval"))

    def copy_in(self, mode: str, twin: nn.Module | None = None) -> nn.Module:
        """A throw-away copy of the model in one of the modes; it shares the parameters of a `twin`, if there is one."""
        copy = unhooked_copy(self._model, twin)
        return copy if mode == "mixed" else copy.train(mode == "train")

    def whole(self, example_inputs: tuple[object, ...] | None = None) -> Region:
        """Trace the whole model; see `trace`."""
        region = self.part("", len(example_inputs or ()))
        if example_inputs is not None:
            try:
                propagate_shapes(region.graphs["eval"], example_inputs)
            except InputError:
                if not self.hooked:
                    raise
                forget_shapes(region.graphs["eval"])
        return region

    def part(self, path: str, given: int) -> Region:
        """Trace the submodule at `path` in all modes, called with `given` arguments.

        Raises:
            UntraceableError: torch.fx can't trace it.
        """
        while True:
            known = len(self.closed)
            graphs, read, opened = {}, set(), set()
            for mode in self.shadows:
                graphs[mode], plain, used = self._trace(path, mode, given)
                read |= used
                opened |= {join(path, each) for each in plain}
            if len(self.closed) == known:  # else they are leaves, in all modes
                return Region(path, graphs, frozenset(read), frozenset(opened))

    def _trace(self, path: str, mode: str, given: int) -> tuple[fx.GraphModule, set[str], set[str]]:
        """Trace the submodule at `path`.

        Returns the graph, the paths in it of the layers that were opened, and those of the parameters that were used.
        """
        root = self.shadows[mode].get_submodule(path)
        if path and (change := change_of(root)) is not None:  # torch.fx would trace the forward of the class
            failure = UntraceableError(f"torch.fx can't trace submodule {path!r} ({type(root).__name__}): {change}")
            failure.why = str(failure)
            raise failure
        layers = custom_layers(root)
        left = self.closed.keys() | self._leaves
        opening = {each: layer for each, layer in layers.items() if join(path, each) not in left}
        stand_ins = traceable(layers)
        tracer = _Tracer(
            path, self._leaves, self.hooked, {each: stand_ins.get(each, opening[each]) for each in opening}
        )
        try:
            with (
                ParameterWatch(self.shadows[mode], isolate=True) as watch,
                own_random_state(),
                warnings.catch_warnings(),
                replaced(root, stand_ins),
            ):
                warnings.simplefilter("ignore")  # they would be about the tracing, not about the model
                graph = tracer.trace(root, concrete_args=_defaults(root, given))
        except Exception as error:
            if tracer.refused is not None:  # so are its likes, very likely
                kind = type(tracer.opening[tracer.refused])
                alike = (each for each, layer in tracer.opening.items() if type(layer) is kind)
                self.closed.update((join(path, each), UNTRACEABLE) for each in alike)
                return self._trace(path, mode, given)
            where = tracer.failed or type(root).__name__
            failure = UntraceableError(
                f"torch.fx can't trace {where} in {mode} mode: {error}\n"
                "Compile the traceable parts on their own, such as model.backbone, or take the data-dependent Python "
                "(branches on tensors, loops over them, len, int) out of that forward"
            )
            failure.why = f"torch.fx can't trace {where} in {mode} mode: {_first_sentence(error)}"
            raise failure from error
        plain, closed = open_layers(graph, opening, tracer.num_calls, tracer.read_outside)
        self.closed.update((join(path, each), reason) for each, reason in closed.items())
        make_callable(graph)
        with replaced(root, plain | as_they_are(layers, plain)):
            return fx.GraphModule(tracer.root, graph), set(plain), watch.used


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__


def _modes(model: nn.Module) -> list[str]:
    training = {module.training for module in model.modules()}
    return ["eval", "train"] if len(training) == 1 else ["eval", "train", "mixed"]


def _defaults(model: nn.Module, given: int) -> dict[str, Any]:
    """Default values of the forward's arguments behind the first `given`."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = list(inspect.signature(model.forward).parameters.values())[given:]
    return {p.name: p.default for p in parameters if p.kind in kinds and p.default is not p.empty}


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


class _Tracer(fx.Tracer):
    """A tracer that knows the compiler's leaves, marks what hooks see, and remembers where it failed."""

    failed: str | None = None
    refused: str | None = None  # path of the custom layer that could not be opened

    def __init__(
        self,
        root_path: str = "",
        leaves: Collection[str] = (),
        hooked: Collection[str] = (),
        opening: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
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
        ours = isinstance(m, _ConvNd | nn.Linear | Grouped) or is_frozen_norm(m)
        return ours or super().is_leaf_module(m, module_qualified_name)

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
        if path is None or all(path != name for name, _ in self.module_stack.values()):
            self.read_outside |= {path} if path is not None else set()
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


def join(path: str, name: str) -> str:
    """Join two dotted paths, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
