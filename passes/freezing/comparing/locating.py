"""Locating: which layer is the first that a frozen form computes differently; asked only where its outputs differ.

What each layer gives is compared at every step from the model to the frozen form: without the filters that nobody
reads, as a graph, with its layers fused, with each layer run in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.freezing.choosing.choosing import Choosing, Running
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.choosing.recipe import Recipe, call_name
from passes.freezing.choosing.stopwatch import Stopwatch
from passes.freezing.comparing.doubt import Expected, Inputs, Record
from passes.freezing.parts import RemoveUnread, Traced, quiet_copy, traced_parts
from passes.freezing.rewrites.rewrite import SHAPES
from passes.infra.compilation import Compilation, Pass
from passes.infra.manager import run_passes
from passes.infra.random_state import seed_all
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.values import tensors_in
from passes.options.arguments import call_model
from passes.options.settings import SETTINGS, Settings
from passes.tracing.operations import module_of
from passes.tracing.regions import find_regions
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
    plain, small = unhooked_copy(model).eval(), quiet_copy(model)
    settings = Settings(example_inputs=inputs)
    run_passes([RemoveUnread()], Compilation(small, {SETTINGS: settings}))
    name = Expected(lambda each: _of_modules(plain, each), inputs).differing(_of_modules(small, inputs))
    if name is not None:
        return name
    for traced in traced_parts(small, find_regions(small, inputs), inputs):
        given = _arguments(plain, traced.path, inputs)
        if given is not None and (name := _in_part(small, traced, layers, given, rewrites)) is not None:
            return name
    return None


def _in_part(
    small: nn.Module, traced: Traced, layers: Mapping[str, LayerDecision], inputs: Inputs, rewrites: Sequence[Pass]
) -> str | None:
    graph, part = traced.graph, small.get_submodule(traced.path)
    expected = Expected(lambda each: _of_modules(part, each), inputs)
    calls = _of_nodes(graph, inputs, lambda node: str(node.target) if node.op == "call_module" else "")
    if (name := expected.differing(calls)) is not None:
        return join(traced.root, name)
    expected = Expected(lambda each: _of_nodes(graph, each, lambda node: node.name), inputs)
    for node in graph.graph.nodes:
        node.meta["stands_for"] = node.name  # rewrites hand it on to what computes the same
    traced.rewritten(rewrites)
    paths = {_stands_for(node): _path(graph, node) for node in graph.graph.nodes}
    name = expected.differing(_of_nodes(graph, inputs, _stands_for))
    if name is None:
        run_passes([Choosing(None, layers, Stopwatch())], Compilation(graph, {SHAPES: inputs}))
        name = expected.differing(_of_nodes(graph, inputs, _stands_for))
    return None if name is None else paths[name]


def _stands_for(node: fx.Node) -> str:
    """The node of the traced graph that gave what this one gives; "" if there was none."""
    return str(node.meta.get("stands_for", ""))


def _path(graph: fx.GraphModule, node: fx.Node) -> str:
    """The path of the layer that a node calls, or the node's name."""
    module = module_of(graph, node)
    return module.path if isinstance(module, Recipe) else node.name


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
        return call_model(model, copy_inputs(inputs))
