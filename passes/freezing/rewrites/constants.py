"""Constants: channels that are the same for every input go into the biases of what reads them.

A filter of a regrouped layer whose group kept no inputs yields its bias alone: ``c = activation(scale · bias + shift)``
at every pixel. A convolution or linear layer that reads it computes ``Σ_taps w · c`` from it, which is constant too
where the layer sees the channel at every tap:

1. it pads with nothing, or with pixels of the picture itself (reflect, replicate, circular);
2. or c is 0, as behind a ReLU that cuts it off: then the zeros of the padding are no other values.

The filter is taken out where all of its readers are such layers. Layers are gone through in order, so that a group
that read nothing but constants is one in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.freezing.choosing.recipe import Recipe
from passes.freezing.rewrites.rewrite import PLAIN_INPUTS, SHAPES, Rewrite, graph_of, recipe_of
from passes.infra.compilation import Compilation
from passes.layers.channel_cut import Cut, smaller
from passes.layers.grouped import Grouped
from passes.layers.known.activations import activate
from passes.layers.known.geometry import conv_groups, is_linear, padding_list, spatial_dims


class FoldConstants(Rewrite):
    """Fold constant channels into the biases of what reads them."""

    name = "fold constants"
    requires = (SHAPES, PLAIN_INPUTS)  # what a layer keeps between ends would have to be cut too

    def run(self, compilation: Compilation) -> None:
        """Go through the layers in order."""
        graph = graph_of(compilation)
        for node in graph.graph.nodes:
            recipe = recipe_of(graph, node)
            if recipe is not None and isinstance(recipe.layer, Grouped) and len(node.args) == 1:
                _fold(node, recipe, [reader_of(graph, user, node) for user in node.users])


def reader_of(graph: fx.GraphModule, user: fx.Node, node: fx.Node) -> Recipe | None:
    """The layer that a user of a node is, which reads it as its input and in no other place, or None."""
    return recipe_of(graph, user) if user.args[:1] == (node,) and node not in user.args[1:] else None


def _fold(node: fx.Node, recipe: Recipe, readers: Sequence[Recipe | None]) -> None:
    """Take the constant filters out of one layer, as far as all of its readers can do without them."""
    found: Any = recipe.layer
    channels = constant_filters(found)
    if not len(channels):
        return
    values = constant_values(recipe, channels)
    taken = torch.ones(len(channels), dtype=torch.bool)
    for reader in readers:
        taken &= _may_take(found, reader, values)
    channels, values = channels[taken], values[taken]
    stay = torch.ones(found.dense_shape[0], dtype=torch.bool).index_fill_(0, channels.cpu(), False).nonzero()[:, 0]
    layers: list[Any] = [each.layer for each in readers if each is not None]
    if not len(channels) or any(isinstance(each, Grouped) and not _reads_any(each, stay) for each in layers):
        return
    for reader in readers:
        if reader is not None:
            reader.add(absorbed(reader.weight(), channels, values))
            reader.layer = smaller(reader.layer, Cut(inputs=stay))
    recipe.keep(stay)
    node.meta["val"] = node.meta["val"].narrow(-1 - spatial_dims(found), 0, len(stay))


def constant_filters(layer: Grouped) -> Tensor:
    """The filters of a regrouped layer whose groups have no inputs, int64."""
    return layer.filters[torch.repeat_interleave(layer.block_sizes[:, 1] == 0, layer.block_sizes[:, 0])]


def constant_values(recipe: Recipe, channels: Tensor) -> Tensor:
    """What the constant `channels` of a recipe without a residual are, float64 ``[len(channels)]``."""
    layer: Any = recipe.layer
    values = torch.zeros(len(channels), dtype=torch.float64, device=channels.device)
    if layer.bias is not None:
        values += layer.bias.detach()[channels]
    if recipe.scale is not None and recipe.shift is not None:
        values = values * recipe.scale[channels] + recipe.shift[channels]
    return activate(recipe.activation, values)


def absorbed(weight: Tensor, channels: Tensor, values: Tensor) -> Tensor:
    """What a layer with `weight` ``[C_out, C_in, *kernel]`` computes from constant channels, float64 ``[C_out]``."""
    read = weight[:, channels].double()
    return read.sum(tuple(range(2, read.dim()))) @ values if read.dim() > 2 else read @ values


def _may_take(maker: Any, reader: Recipe | None, values: Tensor) -> Tensor:
    """Which constants the layer of a reader can take into its bias, bool ``[len(values)]``."""
    if reader is None or not reads_channels(reader.layer, spatial_dims(maker)):
        return torch.zeros(len(values), dtype=torch.bool)
    return (values.cpu() == 0) | (not pads_with_zeros(reader.layer))


def reads_channels(layer: nn.Module, dims: int) -> bool:
    """Whether all filters of a layer may read any channel of a tensor that has so many dimensions behind them."""
    return conv_groups(layer) == 1 and spatial_dims(layer) == dims  # a linear layer reads the last dimension


def pads_with_zeros(layer: Any) -> bool:
    """Whether a layer adds zeros around its input."""
    return not is_linear(layer) and layer.padding_mode == "zeros" and any(padding_list(layer))


def _reads_any(layer: Grouped, inputs: Tensor) -> bool:
    return bool(torch.isin(layer.inputs.cpu(), inputs).any())
