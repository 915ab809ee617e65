"""Plain layers in place of grouped ones, for files that are run without this package.

Two forms, which compute the same: ``"dense"`` is torch's own layer with zeros where connections are pruned;
``"blocks"`` gathers the inputs of each group, computes its block and puts the filters in their places (eq. 17), with
nothing stored but the blocks and the indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.layers.blocks import in_blocks
from passes.layers.custom import Custom, GroupedCustom
from passes.layers.grouped import GROUPED, Form, Grouped
from passes.layers.known.as_torch_made_it import change_of
from passes.layers.known.geometry import spatial_dims
from passes.layers.known.layer_call import CallsWith, LayerCall
from passes.layers.surgery import replace_module, shallow_copy


def make_exportable(model: nn.Module, form: Form) -> None:
    """Put plain layers of `form` in place of all grouped ones, in place.

    Raises:
        InputError: something was changed about one of them, which a plain layer would not have.
    """
    make: Callable[[Grouped], nn.Module] = dense_layer if form == "dense" else Blocks
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Grouped):
            if (change := change_of(layer)) is not None:
                raise InputError(f"layer {path!r} can't be written to a file: {change}; put it back first")
            custom = dense_custom if form == "dense" else CustomBlocks
            replace_module(model, path, custom(layer) if isinstance(layer, GroupedCustom) else make(layer))


def dense_layer(layer: Grouped) -> nn.Module:
    """Torch's own layer with the weights of `layer`, and zeros where its connections are pruned."""
    kind: Any = next(dense for dense, grouped in GROUPED.items() if type(layer) is grouped)
    weight = layer.dense_weight().detach()
    filters, inputs, *kernel = weight.shape
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode") if kernel}
    shape = (inputs, filters, tuple(kernel)) if kernel else (inputs, filters)
    new: nn.Module = kind(*shape, bias=layer.bias is not None, device="meta", **geometry)
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.register_parameter("bias", layer.bias)
    return new.train(layer.training)


def dense_custom(layer: GroupedCustom) -> nn.Module:
    """The user's own layer with the weights of `layer`, and zeros where its connections are pruned."""
    return layer.as_dense(nn.Parameter(layer.dense_weight().detach(), requires_grad=False))


class CustomBlocks(Custom):
    """A grouped custom layer: the user's code, in which the call of its weight is one layer for each group."""

    def __init__(self, layer: GroupedCustom) -> None:
        """Take over the blocks of `layer` and the user's code."""
        super().__init__()
        self.__dict__.update(shallow_copy(layer, GroupedCustom).__dict__)
        plain = layer.plain(LayerCall(type(layer), None, None))
        self._set_geometry = plain.__dict__.update
        self.sgfx_blocks, self.sgfx_dense_shape = Blocks(plain), layer.dense_shape
        del self._parameters["weight"]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Compute the layer. Its code may ask for the shape of the weight, and do nothing else with it."""
        weight = self.sgfx_blocks.weights[0].new_zeros(()).expand(self.sgfx_dense_shape)
        with CallsWith(weight, self._in_blocks, alone=True):
            return self._run(weight, args, kwargs)

    def _in_blocks(self, call: LayerCall) -> Tensor:
        self._set_geometry(call.geometry)
        y: Tensor = self.sgfx_blocks(call.input)
        return y if call.bias is None else y + call.bias.view(-1, *[1] * (call.weight.dim() - 2))


class Blocks(nn.Module):
    """A grouped layer as one ordinary layer for each group."""

    def __init__(self, layer: Grouped) -> None:
        """Take over the blocks of `layer`; nothing else of it is kept."""
        super().__init__()
        self._call, self._pad = layer._call, layer._padded  # they read the geometry alone
        self._spatial_dims = spatial_dims(layer)
        filters, inputs, weights = zip(*layer.group_blocks(), strict=True)
        self.weights = _parameters(weight.detach() for weight in weights)
        bias = None if layer.bias is None else layer.bias.detach()
        self.biases = None if bias is None else _parameters(bias[own] for own in filters)
        for group, read in enumerate(inputs):
            self.register_buffer(f"inputs{group}", read.clone())
        self.register_buffer("places", torch.argsort(layer.filters))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; shapes are those of the dense layer."""
        biases = [None] * len(self.weights) if self.biases is None else self.biases
        parts = [
            (len(weight), self.get_buffer(f"inputs{group}"), weight, bias)
            for group, (weight, bias) in enumerate(zip(self.weights, biases, strict=True))
        ]
        return in_blocks(self._call, self._pad(x), parts, self.get_buffer("places"), self._spatial_dims)


def _parameters(tensors: Iterable[Tensor]) -> nn.ParameterList:
    """Parameters with memory of their own: a file would store the whole of what they are views of."""
    return nn.ParameterList(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in tensors)
