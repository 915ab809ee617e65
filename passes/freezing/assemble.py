"""Assembling: a model's parts as rewritten graphs, how their layers are run, and the whole that is made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from passes.elimination.analysis import ChannelAnalysis
from passes.elimination.elimination import Elimination
from passes.errors import InputError
from passes.freezing.candidates import choose
from passes.freezing.chaining import chain
from passes.freezing.decisions import LayerDecision
from passes.freezing.placing import place
from passes.freezing.rewrites.rewrite import PART, SHAPES, UNFUSED
from passes.freezing.stopwatch import Stopwatch
from passes.infra.compilation import Compilation, Facts, Pass
from passes.infra.manager import run_passes
from passes.layers.grouped import Grouped
from passes.layers.surgery import hook_dicts, replace_module
from passes.models.copying import copy_model
from passes.models.values import mapped
from passes.options.settings import SETTINGS, Settings
from passes.tracing.python_names import rename_keywords
from passes.tracing.regions import Regions, find_regions
from passes.tracing.shapes import find_shapes
from passes.tracing.trace import Region


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


def without_unread_filters(model: nn.Module, inputs: tuple[object, ...]) -> nn.Module:
    """A copy in eval mode, without hooks, from which the filters that nobody reads are gone."""
    small = copy_model(model).eval()
    for module in small.modules():
        for key in hook_dicts(module):
            module.__dict__[key].clear()
    small.requires_grad_(False)
    if any(isinstance(module, Grouped) for module in small.modules()):  # a dense layer reads all that there is
        run_passes((ChannelAnalysis(), Elimination()), Compilation(small, {SETTINGS: Settings(example_inputs=inputs)}))
    return small


def rewritten_parts(small: nn.Module, inputs: tuple[object, ...], rewrites: Sequence[Pass]) -> list[Part]:
    """Rewrite every region of which the shapes are known; `small` stays as it is.

    Raises:
        InputError: there is none.
    """
    regions = find_regions(small, inputs)
    found = [(each.path, each.path, each.graphs["eval"], given) for each, given in usable(regions, inputs)]
    parts = [rewritten(*each, rewrites) for each in (*found, *_alone(small, regions))]
    if not parts:
        raise InputError(f"{type(small).__name__} has no part that can be frozen: {regions.untraceable}")
    return parts


def usable(regions: Regions, inputs: tuple[object, ...]) -> Iterator[tuple[Region, tuple[object, ...]]]:
    """The regions of which the shapes are known, and what the root of each is called with in eval mode."""
    called = regions.observation.called if regions.observation is not None else {}
    for region in regions.parts:
        arguments = called.get(region.path, {}).get("eval", (None,))[0] if region.path else inputs
        if arguments is not None and find_shapes(region.graphs["eval"], arguments):
            yield region, arguments


def rewritten(
    path: str, root: str, graph: fx.GraphModule, arguments: tuple[object, ...], rewrites: Sequence[Pass]
) -> Part:
    """A part of the model with its graph rewritten, in place; `root` is the path of what the graph's modules lie in."""
    known: Facts = {PART: root, SHAPES: arguments}
    found = run_passes(rewrites, Compilation(graph, known))
    return Part(path, graph, filled(arguments), found[UNFUSED])


def _alone(small: nn.Module, regions: Regions) -> Iterator[tuple[str, str, fx.GraphModule, tuple[object, ...]]]:
    """Regrouped layers outside every region, where a run showed how they are called: each as a graph of its own."""
    seen = regions.observation.called if regions.observation is not None else {}
    for path, layer in small.named_modules():
        inputs, keywords = seen.get(path, {}).get("eval", ((), {}))
        if isinstance(layer, Grouped) and inputs and not keywords and regions.outside(path) is not None:
            root, _, name = path.rpartition(".")
            graph = fx.Graph()
            x = graph.placeholder("input")  # its name in the forwards of layers
            graph.output(graph.call_module(name, (x,)))
            alone = fx.GraphModule({name: layer}, graph)
            if find_shapes(alone, inputs):
                yield path, root, alone, inputs


def filled(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Real tensors to measure with; values have no influence on time, but denormal numbers would."""

    return mapped(arguments, lambda x: torch.rand(x.shape, device=x.device).to(x.dtype) if x.is_floating_point() else x)


def assembled(
    small: nn.Module,
    parts: Sequence[Part],
    strategy: str | None,
    given: Mapping[str, LayerDecision],
    stopwatch: Stopwatch,
    step: Callable[[], object] = lambda: None,
) -> tuple[nn.Module, dict[str, LayerDecision]]:
    """Choose how the layers of every part are run, and put the parts in their places in a copy of `small`.

    Returns:
        The whole, and what was decided, by layer.
    """
    layers: dict[str, LayerDecision] = {}
    for part in parts:
        layers.update(choose(part.graph, part.inputs, strategy, given, stopwatch, step))
        place(part.graph)
        chain(part.graph)
    if parts[0].path == "":
        return _finished(parts[0].graph), layers
    whole = copy_model(small)
    for part in parts:
        for key, value in whole.get_submodule(part.path).__dict__.items():
            if key not in part.graph.__dict__ and not key.startswith("_"):
                part.graph.__dict__[key] = value  # what others ask the part for, such as out_channels
        replace_module(whole, part.path, _finished(part.graph))
    return whole.eval(), layers


def _finished(graph: fx.GraphModule) -> fx.GraphModule:
    rename_keywords(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval().requires_grad_(False)
