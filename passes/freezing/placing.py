"""Placing: a layer writes into the padded plane that the next one reads, so that little is copied on the way.

A tensor gets margins where a packed layer makes it and all who read it are packed layers, or add it as a residual:

1. above and below, the largest that a reader of stride 1 wants, so that it needs no copy (the others copy anyway);
2. beside, the same, but at least what its maker leaves between two rows anyway: then results are stored where they
   belong, and need not be put together first. A residual likewise, for the layer that adds it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from passes.freezing.choosing import LAYERS
from passes.freezing.rewrites.rewrite import graph_of
from passes.infra.compilation import Compilation, Pass
from passes.kernel import Geometry, Margins, PackedConv2d
from passes.tracing.operations import module_of


class Placing(Pass):
    """Give margins to the tensors between packed layers."""

    name = "placing"
    requires = (LAYERS,)

    def run(self, compilation: Compilation) -> None:
        """Go through the graph."""
        place(graph_of(compilation))

    def check(self, compilation: Compilation) -> str | None:
        """What a packed layer writes has the margins that those who read it are told."""
        packed = packed_calls(graph_of(compilation))
        for node, layer in packed.items():
            written = layer.form.placement.writes
            for user in node.users:
                placement = packed[user].form.placement if user in packed else None
                reads_wrongly = placement is not None and user.args[0] is node and placement.reads != written
                adds_wrongly = placement is not None and node in user.args[1:] and placement.adds != written
                if reads_wrongly or adds_wrongly:
                    return f"{user.name} reads {node.name} with other margins than it is written with"
        return None


def packed_calls(graph: fx.GraphModule) -> dict[fx.Node, PackedConv2d]:
    """The calls of packed convolutions, in the order of the graph; a packed linear layer is none."""
    modules = {node: module_of(graph, node) for node in graph.graph.nodes}
    return {node: module for node, module in modules.items() if type(module) is PackedConv2d}


def place(graph: fx.GraphModule) -> None:
    """Give margins to the tensors between packed layers of `graph`, in place."""
    packed = packed_calls(graph)
    for node, layer in packed.items():  # in the order of the graph: what a layer reads is settled before it
        if node.users and all(user in packed for user in node.users):
            _place_result(node, layer, packed)


def _place_result(node: fx.Node, layer: PackedConv2d, packed: dict[fx.Node, PackedConv2d]) -> None:
    readers = [packed[user].form.geometry for user in node.users if user.args[0] is node]
    adders = [packed[user].form for user in node.users if node in user.args[1:]]
    wanted = [geometry.margins() for geometry in readers if geometry.stride == (1, 1)]
    beside = [beside_rows(layer.form.geometry, layer.form.placement.reads)]
    beside += [beside_rows(form.geometry, form.placement.reads) for form in adders]
    margins = Margins(
        top=max((each.top for each in wanted), default=0),
        bottom=max((each.bottom for each in wanted), default=0),
        right=max(beside + [each.right for each in wanted]),
    )
    layer.form = replace(layer.form, placement=replace(layer.form.placement, writes=margins))
    for user in node.users:
        form = packed[user].form
        roles = [role for role, read in zip(("reads", "adds"), user.args, strict=False) if read is node]
        packed[user].form = replace(form, placement=replace(form.placement, **dict.fromkeys(roles, margins)))


def beside_rows(geometry: Geometry, reads: Margins) -> int:
    """Pixels that a layer computes between two rows of its result and drops, for an input with margins `reads`."""
    reach, step = geometry.reach[1], geometry.stride[1]
    if geometry.stride != (1, 1):
        return reach // step
    own = geometry.margins()
    in_place = reads.top >= own.top and reads.bottom >= own.bottom and reads.right >= own.right
    row_beyond_picture = reads.right if in_place else own.right
    return max(0, row_beyond_picture + reach - geometry.padding[2] - geometry.padding[3])
