"""Parts: what can be traced of a model, as eval graphs that have been rewritten.

The whole model is one part where torch.fx can trace it; else its regions are, and every regrouped layer outside of them
of which a run showed how it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.elimination.elimination import ELIMINATION
from passes.errors import InputError
from passes.freezing.rewrites.rewrite import PART, SHAPES, UNFUSED
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.manager import run_passes
from passes.layers.grouped import Grouped
from passes.layers.surgery import hook_dicts
from passes.models.copying import copy_model
from passes.models.values import mapped
from passes.options.names import covers
from passes.options.settings import SETTINGS
from passes.tracing.regions import REGIONS, Regions
from passes.tracing.shapes import find_shapes


@dataclass
class Part:
    """A part of the model as a graph that has been rewritten.

    Attributes:
        path: of the part in the model.
        graph: what it computes.
        inputs: what it is called with.
        unfused: what could not be fused, by name, and why.
    """

    path: str
    graph: fx.GraphModule
    inputs: tuple[object, ...]
    unfused: Mapping[str, str]

    def twin(self) -> Part:
        """The same graph of the same layers, in which other forms of them can be put."""
        return Part(self.path, fx.GraphModule(self.graph, copy.deepcopy(self.graph.graph)), self.inputs, self.unfused)


PARTS = Fact[tuple[Part, ...]]("parts")


@dataclass(frozen=True)
class Traced:
    """A part of the model as it was traced.

    Attributes:
        path: of the part in the model.
        root: the path of what the modules of the graph lie in: the same, but of a layer by itself.
        graph: its eval graph, which has shapes.
        arguments: what it is called with.
    """

    path: str
    root: str
    graph: fx.GraphModule
    arguments: tuple[object, ...]

    def rewritten(self, rewrites: Sequence[Pass]) -> Part:
        """The part with its graph rewritten, in place."""
        known: Facts = {PART: self.root, SHAPES: self.arguments}
        found = run_passes(rewrites, Compilation(self.graph, known))
        return Part(self.path, self.graph, filled(self.arguments), found[UNFUSED])


class RemoveUnread(Pass):
    """Take out the filters that nobody reads. A dense model has none."""

    name = "remove unread"
    requires = (SETTINGS,)

    def run(self, compilation: Compilation) -> None:
        """Eliminate, where there are regrouped layers."""
        if any(isinstance(module, Grouped) for module in compilation.model.modules()):
            run_passes(ELIMINATION, compilation.only(SETTINGS))


class Rewriting(Pass):
    """Rewrite the eval graph of every part; the model stays as it is.

    Args:
        rewrites: the passes that do it, such as `passes.pipeline.REWRITES`.
    """

    name = "rewriting"
    requires = (SETTINGS, REGIONS)
    ensures = (PARTS, UNFUSED)
    ends = (REGIONS,)

    def __init__(self, rewrites: Sequence[Pass]) -> None:
        """Take the list."""
        self._rewrites = rewrites

    def run(self, compilation: Compilation) -> Facts:
        """Rewrite part by part."""
        model, regions = compilation.model, compilation[REGIONS]
        inputs = compilation[SETTINGS].example_inputs or ()
        parts = tuple(each.rewritten(self._rewrites) for each in traced_parts(model, regions, inputs))
        if not parts:
            raise InputError(f"{type(model).__name__} has no part that can be frozen: {regions.untraceable}")
        return {PARTS: parts, UNFUSED: {name: why for part in parts for name, why in part.unfused.items()}}

    def check(self, compilation: Compilation) -> str | None:
        """No part lies in another one, which would take its place."""
        paths = [part.path for part in compilation[PARTS]]
        inside = [path for path in paths for other in paths if path != other and covers(other, path)]
        return f"part {inside[0]!r} lies in another one" if inside else None


def quiet_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without hooks, of which nothing is trained."""
    copied = copy_model(model).eval()
    for module in copied.modules():
        for key in hook_dicts(module):
            module.__dict__[key].clear()
    return copied.requires_grad_(False)


def traced_parts(model: nn.Module, regions: Regions, inputs: tuple[object, ...]) -> Iterator[Traced]:
    """The parts of a model of which the shapes are known, where it is called with `inputs`."""
    called = regions.observation.called if regions.observation is not None else {}
    for region in regions.parts:
        arguments = called.get(region.path, {}).get("eval", (None,))[0] if region.path else inputs
        if arguments is not None and find_shapes(region.graphs["eval"], arguments):
            yield Traced(region.path, region.path, region.graphs["eval"], arguments)
    for path, layer in model.named_modules():
        arguments, keywords = called.get(path, {}).get("eval", ((), {}))
        outside = isinstance(layer, Grouped) and regions.outside(path) is not None
        if outside and arguments and not keywords:
            root, _, name = path.rpartition(".")
            alone = _graph_of_layer(name, layer)
            if find_shapes(alone, arguments):
                yield Traced(path, root, alone, arguments)


def _graph_of_layer(name: str, layer: nn.Module) -> fx.GraphModule:
    """A graph that calls a layer, under its own name."""
    graph = fx.Graph()
    x = graph.placeholder("input")  # its name in the forwards of layers
    graph.output(graph.call_module(name, (x,)))
    return fx.GraphModule({name: layer}, graph)


def filled(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Real tensors to measure with; values have no influence on time, but denormal numbers would."""
    return mapped(arguments, lambda x: torch.rand(x.shape, device=x.device).to(x.dtype) if x.is_floating_point() else x)
