"""Assembling: how the layers of a model's parts are run, and the whole that is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from passes.freezing.choosing.choosing import LAYERS
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.parts import Part
from passes.freezing.rewrites.rewrite import SHAPES
from passes.infra.compilation import Compilation, Pass
from passes.infra.manager import run_passes
from passes.layers.surgery import replace_module
from passes.models.copying import copy_model
from passes.tracing.python_names import rename_keywords


def assembled(
    small: nn.Module, parts: Sequence[Part], passes: Sequence[Pass]
) -> tuple[nn.Module, dict[str, LayerDecision]]:
    """Run passes on the graph of every part, and put the parts in their places in a copy of `small`.

    Args:
        small: the model that the parts are of.
        parts: its rewritten parts; their graphs are changed.
        passes: what chooses how each layer is run, and what arranges these.

    Returns:
        The whole, and what was decided, by layer.
    """
    layers: dict[str, LayerDecision] = {}
    for part in parts:
        done = run_passes(passes, Compilation(part.graph, {SHAPES: part.inputs}))
        layers.update(done[LAYERS])
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
