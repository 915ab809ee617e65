"""Elimination: filters whose output nobody reads are removed, with their norm's entries, all the way up the network.

Exact in eval and in train mode: what is removed reaches no output, in any graph. Constant channels (of groups without
inputs) stay, since a batch norm in training maps a constant to another one than in eval. The smaller model is traced
again with the shapes it was analysed with; what it gives must have the shapes it had.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.channels import Channels
from passes.cut import Cut, apply_cuts
from passes.regions import find_regions
from passes.shapes import propagate_shapes, without_storage
from passes.unit import Pass, Unit


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
    requires = ("regions", "channels")

    def run(self, unit: Unit) -> bool:
        """Cut the model by its channel analysis."""
        cuts = cuts_of(unit.channels)
        apply_cuts(unit.model, cuts)
        return bool(cuts)

    def check(self, unit: Unit) -> str | None:
        """What the smaller model gives has the shapes that it had."""
        settings = unit.settings
        after = find_regions(unit.model, settings.example_inputs, settings.leaf_modules)
        for old, new in zip(unit.regions.parts, after.parts, strict=True):
            for mode, graph in old.graphs.items():
                nodes = list(graph.graph.nodes)
                if "val" in nodes[-1].meta:
                    inputs = (node.meta["val"] for node in nodes if node.op == "placeholder")
                    propagate_shapes(new.graphs[mode], pytree.tree_map(without_storage, tuple(inputs)))
                    if _shapes(graph) != _shapes(new.graphs[mode]):
                        return f"region {old.path!r} gives other shapes in {mode} mode than before"
        return None


def _shapes(graph: fx.GraphModule) -> list[object]:
    output = list(graph.graph.nodes)[-1].meta["val"]
    return [x.shape if isinstance(x, Tensor) else x for x in pytree.tree_leaves(output)]
