"""Locating: which layer is the first that a frozen form computes differently; asked only where its outputs differ.

What each layer gives is compared at every step from the model to the frozen form: without the filters that nobody
reads, as a graph, with its layers fused, with each layer run in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.freezing.assemble import rewritten, usable, without_unread_filters
from passes.freezing.candidates import Running, choose
from passes.freezing.decisions import LayerDecision
from passes.freezing.doubt import Expected, Inputs, Record
from passes.freezing.recipe import call_name
from passes.freezing.stopwatch import Stopwatch
from passes.infra.compilation import Pass
from passes.infra.random_state import seed_all
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.values import tensors_in
from passes.options.arguments import call
from passes.tracing.operations import module_of
from passes.tracing.regions import find_regions
from passes.tracing.trace import Region
from passes.tracing.tracer import join


def first_difference(
    model: nn.Module, layers: Mapping[str, LayerDecision], inputs: Inputs, rewrites: Sequence[Pass]
) -> str | None:
    """Path of the first layer that a frozen form of `model` computes differently; None if every layer agrees.

    Args:
        model: the model that was frozen.
        layers: how each layer is run.
        inputs: example inputs.
        rewrites: what rewrote its graphs.
    """
    plain, small = unhooked_copy(model).eval(), without_unread_filters(model, inputs)
    name = Expected(lambda each: _of_modules(plain, each), inputs).differing(_of_modules(small, inputs))
    if name is not None:
        return name
    for region, _ in usable(find_regions(small, inputs), inputs):
        given = _arguments(plain, region.path, inputs)
        if given is not None:
            name = _in_region(small.get_submodule(region.path), region, layers, given, rewrites)
            if name is not None:
                return name
    return None


def _in_region(
    part: nn.Module, region: Region, layers: Mapping[str, LayerDecision], inputs: Inputs, rewrites: Sequence[Pass]
) -> str | None:
    graph, paths = region.graphs["eval"], {}
    expected = Expected(lambda each: _of_modules(part, each), inputs)
    traced = _of_nodes(graph, inputs, lambda node: str(node.target) if node.op == "call_module" else "")
    if (name := expected.differing(traced)) is not None:
        return join(region.path, name)
    expected = Expected(lambda each: _of_nodes(graph, each, lambda node: node.name), inputs)
    for node in graph.graph.nodes:
        node.meta["stands_for"] = node.name  # fusing hands it on to what computes the same
    rewritten(region.path, region.path, graph, inputs, rewrites)
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        paths[node.meta.get("stands_for", "")] = getattr(module, "path", None) or node.name
    for chosen in (False, True):
        if chosen:
            choose(graph, inputs, None, layers, Stopwatch())
        name = expected.differing(_of_nodes(graph, inputs, lambda node: node.meta.get("stands_for", "")))
        if name is not None:
            return str(paths[name])
    return None


def _of_modules(model: nn.Module, inputs: Inputs) -> Record:
    """What each call of a module of a model without hooks gives."""
    found: Record = {}

    def note(path: str) -> Any:
        return lambda _, args, output: found.update({call_name(path, found): [x.clone() for x in tensors_in(output)]})

    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules()]
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_nodes(graph: fx.GraphModule, inputs: Inputs, name: Callable[[fx.Node], str]) -> Record:
    """What the nodes of a graph give, by their names; those without one are left out."""
    found: Record = {}

    class Noting(Running):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if name(n) and n.op != "output":
                found[call_name(name(n), found)] = [x.clone() for x in tensors_in(value)]
            return value

    _run(Noting(graph).run, inputs)
    return found


def _arguments(model: nn.Module, path: str, inputs: Inputs) -> Inputs | None:
    """What a part of a model is called with first, when the model is called with `inputs`; None if it isn't."""
    seen: list[Inputs] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(copy_inputs(args)))
    try:
        _run(model, inputs)
    finally:
        handle.remove()
    return seen[0] if seen else None


def _run(model: Callable[..., Any], inputs: Inputs) -> Any:
    seed_all(0)
    with torch.no_grad():
        return call(model, copy_inputs(inputs))
