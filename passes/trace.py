"""Tracing: how the compiler understands a model, as torch.fx graphs.

1. A model has two graphs, eval and train; one whose modules are in mixed modes (norms frozen in eval) has a third. A
   fact about a layer holds only if it holds in all of them.
2. The live model is never touched: what is traced is a shadow, which shares the parameters and has no hooks.
3. torch's layers and subclasses of them are leaves, and so are the compiler's own.
4. Arguments that have a default keep it, unless example inputs give them a value.
5. Shapes come from fake tensors, never from running the model; every node of the eval graph has them under
   ``meta["val"]`` where example inputs were given.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from passes.copying import shadow
from passes.errors import InputError
from passes.facts import Region
from passes.layers.grouped import Grouped
from passes.random_state import preserved_random_state
from passes.unit import Pass, Unit


def trace(model: nn.Module, example_inputs: tuple[object, ...] | None = None) -> Region:
    """Trace the whole `model` in eval and train mode (and in its own, where that is mixed).

    Args:
        model: any module; it is neither run nor changed.
        example_inputs: positional arguments of its forward, to compute shapes with; None leaves shapes out.

    Raises:
        InputError: the model can't be traced, or the example inputs do not fit it.
    """
    if "forward" in model.__dict__:
        raise InputError(f"{type(model).__name__}.forward was replaced on the instance; put it back before compiling")
    graphs = {mode: _trace(model, mode, len(example_inputs or ())) for mode in _modes(model)}
    if example_inputs is not None:
        with preserved_random_state():
            _ShapePropagation(graphs["eval"]).propagate(example_inputs)
    return Region("", graphs)


def calls(regions: list[Region]) -> Iterator[tuple[str, fx.Node, nn.Module]]:
    """Yield each call of a module, in order of execution: the graph's mode, the node, and the module called."""
    for region in regions:
        for mode, graph in region.graphs.items():
            for node in graph.graph.nodes:
                if node.op == "call_module":
                    yield mode, node, graph.get_submodule(str(node.target))


def _modes(model: nn.Module) -> list[str]:
    training = {module.training for module in model.modules()}
    return ["eval", "train"] if len(training) == 1 else ["eval", "train", "mixed"]


def _trace(model: nn.Module, mode: str, given: int) -> fx.GraphModule:
    root = shadow(model)
    if mode != "mixed":
        root.train(mode == "train")
    tracer = _Tracer()
    try:
        with preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would be about the tracing, not about the model
            graph = tracer.trace(root, concrete_args=_defaults(root, given))
    except Exception as error:
        where = tracer.failed or type(model).__name__
        raise InputError(
            f"torch.fx can't trace {where} in {mode} mode: {error}\n"
            "Compile the traceable parts on their own, such as model.backbone, or take the data-dependent Python "
            "(branches on tensors, loops over them, len, int) out of that forward"
        ) from error
    return fx.GraphModule(tracer.root, graph)


def _defaults(model: nn.Module, given: int) -> dict[str, Any]:
    """Default values of the forward's arguments behind the first `given`."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = list(inspect.signature(model.forward).parameters.values())[given:]
    return {p.name: p.default for p in parameters if p.kind in kinds and p.default is not p.empty}


class _Tracer(fx.Tracer):
    """A tracer that knows the compiler's leaves and remembers where it failed."""

    failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Besides torch's own modules: subclasses of its layers, and grouped layers."""
        return isinstance(m, _ConvNd | nn.Linear | Grouped) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace into a module, or past it if it is a leaf."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost module is the first to know
                self.failed = f"submodule {self.path_of_module(m)!r} ({type(m).__name__})"
            raise


class _ShapePropagation(fx.Interpreter):
    """Runs a graph on fake tensors and notes each node's value under ``meta["val"]``."""

    def propagate(self, inputs: tuple[object, ...]) -> None:
        """Propagate the shapes of `inputs` through the graph."""
        self.extra_traceback = False  # or fx appends its own words to our messages
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = pytree.tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, inputs)
        expected = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(fakes) > len(expected):
            raise InputError(f"example_inputs has {len(fakes)} tensors, the model's forward takes {len(expected)}")
        self._shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(inputs)]
        with mode, torch.no_grad():
            self.run(*fakes)

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node, and say where it was when shapes do not fit."""
        try:
            value = super().run_node(n)
        except Exception as error:
            where = f"at layer {n.target!r}" if n.op == "call_module" else f"at {n.name!r}"
            given = ", ".join(map(str, self._shapes))
            raise InputError(f"example_inputs of shape {given} do not fit the model {where}: {error}") from error
        n.meta["val"] = value
        return value


class Trace(Pass):
    """Write the regions of the model."""

    name = "trace"
    ensures = ("regions",)

    def run(self, unit: Unit) -> bool:
        """Trace the model whole."""
        unit.regions = [trace(unit.model, unit.settings.example_inputs)]
        return False
