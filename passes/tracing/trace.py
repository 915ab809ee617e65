"""Tracing: how the compiler understands a model, as torch.fx graphs.

1. A model has two graphs, eval and train; one whose modules are in mixed modes (norms frozen in eval) has a third. A
   fact about a layer holds only if it holds in all of them.
2. The live model is never touched, even by a forward that writes to its parameters: what is traced are shadows, with
   parameters of their own and no hooks. What a module with hooks takes and gives is marked under ``meta["exposed"]``.
3. torch's layers are leaves, and so are the compiler's own and those that the user names. Subclasses of torch's layers
   are opened where their code allows it (`passes.tracing.opening`), else leaves too.
4. Arguments that have a default keep it, unless example inputs give them a value.
5. Calls are in one form (`calls`), whatever is given by keyword.
6. Shapes come from fake tensors, never from running the model; every node of the eval graph has them under
   ``meta["val"]`` where example inputs were given.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

from torch import fx, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.infra.random_state import own_random_state
from passes.layers.known.as_torch_made_it import change_of
from passes.models.copying import unhooked_copy
from passes.options.arguments import constant_parameters, count_collected
from passes.tracing.opening import (
    UNTRACEABLE,
    as_they_are,
    closed_from_the_start,
    custom_layers,
    open_layers,
    replaced,
    traceable,
)
from passes.tracing.parameter_use import ParameterWatch
from passes.tracing.python_names import make_callable
from passes.tracing.shapes import forget_shapes, propagate_shapes
from passes.tracing.tracer import Tracer, has_global_hooks, join

WAY_OUT = (
    "Compile the traceable parts on their own, such as model.backbone, or take the data-dependent Python (branches on "
    "tensors, loops over them, len, int) out of that forward"
)
RUNNING_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Region:
    """A part of the model that torch.fx can trace.

    Attributes:
        path: path of its root in the model; "" for the whole model.
        graphs: a graph for each mode: "eval", "train", and "mixed" where the model's own modes are.
        read: paths of the parameters that operations used while tracing, outside of a layer's own call.
        opened: paths of the custom layers that were traced into: a plain layer is called under their path.
    """

    path: str
    graphs: dict[str, fx.GraphModule]
    read: frozenset[str] = frozenset()
    opened: frozenset[str] = frozenset()

    def module_path(self, node: fx.Node) -> str:
        """Path in the model of the module or tensor that a node of one of the graphs names."""
        return f"{self.path}.{node.target}" if self.path else str(node.target)


class UntraceableError(InputError):
    """torch.fx can't trace a module as a whole. Its message says why, and `why` says it in one line."""

    def __init__(self, message: str, *, why: str) -> None:
        """Take both."""
        super().__init__(message)
        self.why = why


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


def module_calls(regions: Iterable[Region]) -> Iterator[tuple[str, str, nn.Module]]:
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
        given = example_inputs or ()
        region = self.part("", len(given), constant_parameters(self._model, len(given), given))
        if example_inputs is not None:
            try:
                propagate_shapes(region.graphs["eval"], example_inputs)
            except InputError:
                if not self.hooked:
                    raise
                forget_shapes(region.graphs["eval"])
        return region

    def part(self, path: str, given: int, kept: Mapping[str, Any] | None = None) -> Region:
        """Trace the submodule at `path` in all modes, called with `given` arguments.

        Those in `kept` have these values; if it is None, those that are not given keep their default.

        Raises:
            UntraceableError: torch.fx can't trace it.
        """
        while True:
            known = len(self.closed)
            graphs, read, opened = {}, set(), set()
            for mode in self.shadows:
                graphs[mode], plain, used = self._trace(path, mode, given, kept)
                read |= used
                opened |= {join(path, each) for each in plain}
            if len(self.closed) == known:  # else they are leaves, in all modes
                return Region(path, graphs, frozenset(read), frozenset(opened))

    def _trace(
        self, path: str, mode: str, given: int, kept: Mapping[str, Any] | None
    ) -> tuple[fx.GraphModule, set[str], set[str]]:
        """Trace the submodule at `path`.

        Returns the graph, the paths in it of the layers that were opened, and those of the parameters that were used.
        """
        root = self.shadows[mode].get_submodule(path)
        if path and (change := change_of(root)) is not None:  # torch.fx would trace the forward of the class
            why = f"torch.fx can't trace submodule {path!r} ({type(root).__name__}): {change}"
            raise UntraceableError(why, why=why)
        layers = custom_layers(root)
        left = self.closed.keys() | self._leaves
        opening = {each: layer for each, layer in layers.items() if join(path, each) not in left}
        stand_ins = traceable(layers)
        tracer = Tracer(path, self._leaves, self.hooked, {each: stand_ins.get(each, opening[each]) for each in opening})
        tracer.collected = count_collected(root, given)
        with _released(tracer):
            try:
                with (
                    ParameterWatch(self.shadows[mode], isolate=True) as watch,
                    own_random_state(),
                    warnings.catch_warnings(),
                    replaced(root, stand_ins),
                ):
                    warnings.simplefilter("ignore")  # they would be about the tracing, not about the model
                    graph = tracer.trace(
                        root, concrete_args=constant_parameters(root, given) if kept is None else dict(kept)
                    )
            except Exception as error:
                let_memory_errors_pass(error)
                if tracer.refused is not None:  # so are its likes, very likely
                    kind = type(tracer.opening[tracer.refused])
                    alike = (each for each, layer in tracer.opening.items() if type(layer) is kind)
                    self.closed.update((join(path, each), UNTRACEABLE) for each in alike)
                    return self._trace(path, mode, given, kept)
                clear_frames(error.__traceback__)  # one of torch.fx holds itself, and with it all that called it
                where = tracer.failed or type(root).__name__
                raise UntraceableError(
                    f"torch.fx can't trace {where} in {mode} mode: {error}\n{WAY_OUT}",
                    why=f"torch.fx can't trace {where} in {mode} mode: {_first_sentence(error)}",
                ) from error
            plain, closed = open_layers(graph, opening, tracer.num_calls, tracer.read_outside)
            self.closed.update((join(path, each), reason) for each, reason in closed.items())
            make_callable(graph)
            with replaced(root, plain | as_they_are(layers, plain)):
                return fx.GraphModule(tracer.root, graph), set(plain), watch.used


@contextmanager
def _released(tracer: Tracer) -> Iterator[None]:
    """Empty a tracer on leaving: torch.fx leaves it in a cycle of closures, and what it holds with it."""
    try:
        yield
    finally:
        vars(tracer).clear()


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__


def _modes(model: nn.Module) -> list[str]:
    training = {module.training for module in model.modules()}
    return ["eval", "train"] if len(training) == 1 else ["eval", "train", "mixed"]
