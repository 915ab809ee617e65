"""What follows a layer, as far as it decides what the layer's output should be.

    layer → norm (of running statistics)? → sum with another branch? → ReLU?

Each link must be the only reader of the one before it, or something else would read a tensor that is being bent. A norm
in eval mode is affine per channel, so a wanted value behind it has exactly one wanted value before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from passes.layers.known.norms import is_affine
from passes.tracing.mutation import works_in_place
from passes.tracing.operations import activation_of, is_sum, module_of, passes_on


@dataclass(frozen=True)
class Followers:
    """What follows one call of a layer.

    Attributes:
        norm: the call of the norm that alone reads the layer, or None.
        other: the node that is added to the layer's (normed) output, or None.
        clipped: whether all of it is read through a ReLU alone.
    """

    norm: fx.Node | None
    other: fx.Node | None
    clipped: bool


def followers_of(graph: fx.GraphModule, node: fx.Node) -> Followers:
    """Look at what follows the call `node` of a layer in `graph`, an eval graph."""
    norm = other = None
    last, reader = _only_reader(graph, node)
    if reader is not None and is_affine(module_of(graph, reader)):
        norm = reader
        last, reader = _only_reader(graph, norm)
    if reader is not None and is_sum(reader):
        added = [each for each in reader.args if each is not last]
        if len(added) == 1 and isinstance(added[0], fx.Node) and not _any_in_place(graph, node, reader):
            other = added[0]
            last, reader = _only_reader(graph, reader)
    clipped = reader is not None and activation_of(graph, reader) in ("relu", "relu6")
    return Followers(norm, other, clipped)


def _any_in_place(graph: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether something between two nodes works in place: what is added then may not be known at the first yet."""
    node = first.next
    while node is not last and node.op != "root":
        if works_in_place(graph, node):
            return True
        node = node.next
    return False


def _only_reader(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The one node that reads `node`, or None, and what it reads: `node`, or a module that passes it on unchanged."""
    while len(node.users) == 1 and "exposed" not in node.meta:
        reader = next(iter(node.users))
        if not passes_on(module_of(graph, reader)):
            return node, reader
        node = reader
    return node, None
