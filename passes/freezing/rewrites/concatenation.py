"""Joining: concatenations that grow, as in a DenseNet, add to one tensor instead of copying it anew each time.

A layer of a dense block reads ``cat([x₀, …, xₖ], 1)``, the next one ``cat([x₀, …, xₖ, xₖ₊₁], 1)``. All of them are the
first channels of the longest, which is allocated once; each step copies what is new. A concatenation takes part where
nobody who reads it could change it in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.rewrite import SHAPES, Rewrite, graph_of
from passes.infra.compilation import Compilation
from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.tracing.mutation import is_unchanged

READERS = (Recipe, FusedNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.BatchNorm2d)
CATS = (torch.cat, torch.concat, torch.concatenate)


class Step(NamedTuple):
    """A concatenation, and what it puts together, those within it taken apart."""

    node: fx.Node
    parts: list[fx.Node]


def begin(parts: list[Tensor], channels: int) -> Tensor:
    """Allocate ``[N, channels, …]`` and put `parts` into the first channels."""
    joined = parts[0].new_empty(parts[0].shape[0], channels, *parts[0].shape[2:])
    append(joined, parts, 0)
    return joined


def append(joined: Tensor, parts: list[Tensor], start: int) -> Tensor:
    """Put `parts` into the channels from `start` on, and return all channels up to there."""
    for part in parts:
        joined.narrow(1, start, part.shape[1]).copy_(part)
        start += part.shape[1]
    return joined.narrow(1, 0, start)


class JoinConcatenations(Rewrite):
    """Let growing concatenations add to one tensor."""

    name = "join concatenations"
    requires = (SHAPES,)

    def run(self, compilation: Compilation) -> None:
        """Find those that belong together, and rewrite them."""
        graph = graph_of(compilation)
        for chain in growing(graph):
            if len(chain) > 1:
                _rewrite(graph, chain)
        graph.recompile()


def growing(graph: fx.GraphModule) -> list[list[Step]]:
    """The concatenations that may grow, each with those that add to it."""
    chains: list[list[Step]] = []
    for node in graph.graph.nodes:
        if _may_grow(graph, node):
            step = Step(node, _parts(node))
            chain = next((chain for chain in chains if _continues(graph, chain[-1], step)), None)
            if chain is None:
                chains.append([step])
            else:
                chain.append(step)
    return chains


def _may_grow(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node concatenates channels, for readers that leave their input alone."""
    if not _joins_channels(node):
        return False
    modules = [graph.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    others = [user for user in node.users if user.op != "call_module"]
    return all(type(each) in READERS and is_as_torch_made_it(each) for each in modules) and all(
        map(_joins_channels, others)
    )


def _joins_channels(node: fx.Node) -> bool:
    if node.target not in CATS or not isinstance(node.args[0], list | tuple):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(dim == 1) and all(isinstance(part, fx.Node) for part in node.args[0])


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation puts together, those within it taken apart."""
    parts: Any = node.args[0]
    return [each for part in parts for each in (_parts(part) if _joins_channels(part) else [part])]


def _continues(graph: fx.GraphModule, last: Step, step: Step) -> bool:
    """Whether a concatenation adds to the last one of a chain, whose parts are still what they were."""
    longer = len(step.parts) > len(last.parts) and step.parts[: len(last.parts)] == last.parts
    return longer and all(is_unchanged(graph, part, last.node, step.node) for part in last.parts)


def _rewrite(graph: fx.GraphModule, chain: list[Step]) -> None:
    before = chain[0].parts
    with graph.graph.inserting_before(chain[0].node):
        whole = graph.graph.call_function(begin, (before, chain[-1].node.meta["val"].shape[1]))
    for node, parts in chain:
        start = sum(part.meta["val"].shape[1] for part in before)
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(append, (whole, parts[len(before) :], start))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        before = parts
