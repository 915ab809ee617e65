"""Placing: a step writes into the padded plane that the next one reads, so that little is copied on the way.

A tensor gets margins where a step of the kernel makes it and all who read it are steps too:

1. above and below, the largest that a layer of stride 1 wants, so that it needs no copy (the others copy anyway);
2. beside, the same, but at least what its maker leaves between two rows anyway: then results are stored where they
   belong, and need not be put together first. A residual likewise, for the layer that adds it.
3. Steps that read pictures as they are want none, and leave nothing between two rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from passes.freezing.arranging.stepping import Step, steps_of
from passes.freezing.choosing.choosing import LAYERS
from passes.freezing.rewrites.rewrite import graph_of
from passes.infra.compilation import Compilation, Pass
from passes.kernel import Geometry, Margins, PackedConv2d
from passes.kernel.form import moves_window


class Placing(Pass):
    """Give margins to the tensors between steps."""

    name = "placing"
    requires = (LAYERS,)

    def run(self, compilation: Compilation) -> None:
        """Go through the graph."""
        place(graph_of(compilation))

    def check(self, compilation: Compilation) -> str | None:
        """What a step writes has the margins that those who read it are told."""
        packed = steps_of(graph_of(compilation))
        for node, layer in packed.items():
            written = layer.form.placement.writes
            for user in node.users:
                placement = packed[user].form.placement if user in packed else None
                reads_wrongly = placement is not None and user.args[0] is node and placement.reads != written
                adds_wrongly = placement is not None and node in user.args[1:] and placement.adds != written
                if reads_wrongly or adds_wrongly:
                    return f"{user.name} reads {node.name} with other margins than it is written with"
        return None


def place(graph: fx.GraphModule) -> None:
    """Give margins to the tensors between steps of `graph`, in place."""
    steps = steps_of(graph)
    for node, step in steps.items():  # in the order of the graph: what a step reads is settled before it
        if node.users and all(user in steps for user in node.users):
            _place_result(node, step, steps)


def _place_result(node: fx.Node, step: Step, steps: dict[fx.Node, Step]) -> None:
    readers = [_rows_of(steps[user]) for user in node.users if user.args[0] is node]
    adders = [steps[user] for user in node.users if node in user.args[1:]]
    wanted = [geometry.margins() for geometry in readers if geometry is not None and geometry.stride == (1, 1)]
    beside = [0]
    for each in (step, *adders):
        if (geometry := _rows_of(each)) is not None:
            beside.append(beside_rows(geometry, each.form.placement.reads))
    margins = Margins(
        top=max((each.top for each in wanted), default=0),
        bottom=max((each.bottom for each in wanted), default=0),
        right=max(beside + [each.right for each in wanted]),
    )
    step.form = _placed(step, {"writes": margins})
    for user in node.users:
        roles = [role for role, read in zip(("reads", "adds"), user.args, strict=False) if read is node]
        steps[user].form = _placed(steps[user], dict.fromkeys(roles, margins))


def _placed(step: Step, margins: dict[str, Margins]) -> Any:
    return replace(step.form, placement=replace(step.form.placement, **margins))


def _rows_of(step: Step) -> Geometry | None:
    """How a layer moves over rows of pixels, or None for a step that reads pictures as they are."""
    if not isinstance(step, PackedConv2d) or moves_window(step.form, step.tables.structure()):
        return None
    return step.form.geometry


def beside_rows(geometry: Geometry, reads: Margins) -> int:
    """Pixels that a layer computes between two rows of its result and drops, for an input with margins `reads`."""
    reach, step = geometry.reach[1], geometry.stride[1]
    if geometry.stride != (1, 1):
        return reach // step
    own = geometry.margins()
    in_place = reads.top >= own.top and reads.bottom >= own.bottom and reads.right >= own.right
    row_beyond_picture = reads.right if in_place else own.right
    return max(0, row_beyond_picture + reach - geometry.padding[2] - geometry.padding[3])
