"""Elimination: filters whose output nobody reads are removed, with their norm's entries, all the way up the network.

Exact in eval and in train mode: what is removed reaches no output, in any graph. Constant channels (of groups without
inputs) stay, since a batch norm in training maps a constant to another one than in eval. The smaller model is traced
again: it must do the same, number for number, or its forward computes with a layer's `out_channels` and the like, and
nothing is cut. What it gives must have the shapes it had.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from passes.elimination.analysis import CHANNELS, ChannelAnalysis, Channels
from passes.errors import PassError
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.manager import run_passes
from passes.layers.channel_cut import Cut, apply_cuts
from passes.layers.surgery import replace_module
from passes.models.values import Plain, leaves, mapped
from passes.options.settings import SETTINGS, Settings
from passes.tracing.regions import REGIONS, Regions, find_regions
from passes.tracing.shapes import propagate_shapes, without_storage

M = TypeVar("M", bound=nn.Module)

CUTS = Fact[dict[str, Cut]]("cuts")  # what was taken out of each module, by path
UNCUT = Fact[dict[str, str]]("uncut")  # why modules that nobody reads whole were left as they are, by path


def cuts_of(channels: Channels) -> dict[str, Cut]:
    """What can be cut of each module, by path, from the analysis."""
    found = {}
    for path, site in channels.sites.items():
        inputs = channels.present[site.reads[0]]
        outputs = inputs if site.slots is None else channels.present[site.slots]
        if outputs.all() and inputs.all():
            continue
        found[path] = Cut(_index(outputs), _index(inputs) if site.slots is not None else None)
    return found


def _index(present: Tensor) -> Tensor | None:
    return None if present.all() else present.nonzero()[:, 0]


class Elimination(Pass):
    """Remove the filters that nobody reads from a lowered model."""

    name = "elimination"
    requires = (SETTINGS, REGIONS, CHANNELS)
    ensures = (CUTS, UNCUT)
    ends = (REGIONS, CHANNELS)

    def run(self, compilation: Compilation) -> Facts:
        """Cut the model by its channel analysis, or leave it whole, with a reason."""
        model, settings, before = compilation.model, compilation[SETTINGS], compilation[REGIONS]
        cuts = cuts_of(compilation[CHANNELS])
        if not cuts:
            return {CUTS: {}, UNCUT: {}}
        whole = {path: model.get_submodule(path) for path in cuts}
        apply_cuts(model, cuts)
        after = find_regions(model, settings.example_inputs, settings.leaf_modules)
        if _programs(after) == _programs(before):
            _check_shapes(before, after)
            return {CUTS: cuts, UNCUT: {}}
        for path, module in whole.items():
            replace_module(model, path, module)
        return {CUTS: {}, UNCUT: dict.fromkeys(cuts, "the model's own code computes with a layer's number of channels")}


def _check_shapes(before: Regions, after: Regions) -> None:
    """What the smaller model gives has the shapes that it had."""
    for old, new in zip(before.parts, after.parts, strict=True):
        for mode, graph in old.graphs.items():
            nodes = list(graph.graph.nodes)
            if "val" in nodes[-1].meta:
                inputs = (node.meta["val"] for node in nodes if node.op == "placeholder")
                propagate_shapes(new.graphs[mode], mapped(tuple(inputs), without_storage))
                if _shapes(graph) != _shapes(new.graphs[mode]):
                    raise PassError(f"region {old.path!r} gives other shapes in {mode} mode than before")


def _programs(regions: Regions) -> list[object]:
    """What the graphs of all regions do, step by step, with all numbers that stand in them."""
    return [
        (region.path, mode, node.op, node.target, str(node.args), str(node.kwargs), _constant(graph, node))
        for region in regions.parts
        for mode, graph in region.graphs.items()
        for node in graph.graph.nodes
    ]


def _constant(graph: fx.GraphModule, node: fx.Node) -> object:
    """The values of a tensor that tracing found ready-made."""
    if node.op != "get_attr" or "_tensor_constant" not in str(node.target):
        return None
    tensor: Tensor = attrgetter(str(node.target))(graph)
    return None if tensor.is_meta else torch.as_tensor(tensor).tolist()


def _shapes(graph: fx.GraphModule) -> list[object]:
    return [(place, _kind(x)) for place, x in leaves(list(graph.graph.nodes)[-1].meta["val"])]


def _kind(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.shape
    return leaf if isinstance(leaf, Plain | float) else type(leaf)


ELIMINATION: tuple[Pass, ...] = (ChannelAnalysis(), Elimination())


def remove_unread_filters(
    model: M, example_inputs: tuple[object, ...] | None = None, leaf_modules: tuple[str, ...] = ()
) -> M:
    """Run both passes of elimination on a lowered model, in place, and return it.

    Args:
        model: has grouped layers; filters of dense ones alone are all read.
        example_inputs: the arguments of its forward, where shapes can't be guessed.
        leaf_modules: paths of modules that are not to be traced into.

    Raises:
        InputError: the example inputs do not fit.
    """
    settings = Settings(example_inputs=example_inputs, leaf_modules=leaf_modules)
    run_passes(ELIMINATION, Compilation(model, {SETTINGS: settings}))
    return model
