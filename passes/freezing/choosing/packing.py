"""A layer as the kernel takes it: plain blocks of weights and a geometry, with the norms behind it folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.kernel import (
    DEFAULT_TILING,
    NO_PLACEMENT,
    Block,
    Geometry,
    PackedConv2d,
    Placement,
    Tiling,
    pack_blocks,
)
from passes.layers.grouped import GroupedConv2d, GroupedLinear
from passes.layers.known.geometry import is_linear, paddings


def pack_layer(
    layer: nn.Module,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    ends: Tensor | None = None,
    activation: str | None = None,
    placement: Placement = NO_PLACEMENT,
    tiling: Tiling = DEFAULT_TILING,
) -> PackedConv2d:
    """Pack a dense, depthwise or regrouped ``Conv2d`` or ``Linear``, with a batch norm folded in.

    Args:
        layer: the layer; the result shares nothing with it.
        scale: ``[out_channels]``, what each filter is multiplied by, or None.
        shift: ``[out_channels]``, what is added to each filter after that, or None.
        ends: ``[in_channels, 2]``, the least and the largest number that each input counts as, or None. Not for layers
            with padding.
        activation: name of the activation, or None.
        placement: the margins of x, residual and result.
        tiling: how the work is cut.

    Returns:
        A `PackedLinear` for linear layers, else a `PackedConv2d`.
    """
    blocks, geometry = layer_blocks(layer), layer_geometry(layer)
    bias: Any = layer.bias
    if scale is not None:
        blocks = [Block(b.filters, b.inputs, b.weight * scale.detach()[b.filters][:, None, None, None]) for b in blocks]
        bias = None if bias is None else bias.detach() * scale.detach()
    if shift is not None:
        bias = shift.detach() if bias is None else bias.detach() + shift.detach()
    return pack_blocks(
        blocks, geometry, bias, linear=is_linear(layer), ends=ends, activation=activation,
        placement=placement, tiling=tiling,
    )  # fmt: skip


def layer_blocks(layer: nn.Module) -> list[Block]:
    """Blocks of a dense, grouped or depthwise ``Conv2d``, a ``Linear``, or a regrouped layer of either kind."""
    if isinstance(layer, GroupedConv2d | GroupedLinear):
        kernel = layer.dense_shape[2:] or (1, 1)
        return [
            Block(own, read, part.detach().view(*part.shape[:2], *kernel)) for own, read, part in layer.group_blocks()
        ]
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise InputError(
            f"the kernel computes Conv2d and Linear layers, dense or regrouped, not {type(layer).__name__}"
        )
    weight = layer.weight.detach()
    weight = weight.flatten(1)[:, :, None, None] if isinstance(layer, nn.Linear) else weight
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    reads = weight.shape[1]
    return [
        Block(torch.arange(len(part)) + index * len(part), torch.arange(reads) + index * reads, part)
        for index, part in enumerate(weight.chunk(groups))
    ]


def layer_geometry(layer: Any) -> Geometry:
    """Geometry of a dense or regrouped ``Conv2d`` or ``Linear``."""
    if is_linear(layer):
        return Geometry(layer.out_features, layer.in_features)
    if layer.padding_mode != "zeros":
        raise InputError(f"the kernel pads with zeros, not with padding_mode={layer.padding_mode!r}")
    (top, bottom), (left, right) = paddings(layer)
    return Geometry(
        layer.out_channels,
        layer.in_channels,
        layer.kernel_size,
        layer.stride,
        (top, bottom, left, right),
        layer.dilation,
    )
