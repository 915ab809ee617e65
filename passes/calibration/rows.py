"""Unfolding: a convolution at sampled positions as a matrix product, for any number of dimensions.

A row of the result is what one output position reads: ``C_in`` channels times the kernel, in the order of the flattened
weight ``[C_out, C_in · kernel]``. Positions count over images and output pixels, image after image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.layers.known.geometry import is_linear, output_sizes, padding_list, spatial_dims


def input_rows(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """What `layer` reads at `positions`: ``[len(positions), C_in · kernel]``.

    Args:
        layer: a dense or grouped convolution or linear layer.
        x: its input, ``[N, C_in, *size]`` (linear: ``[…, C_in]``).
        positions: int64, into the ``N · output pixels`` (linear: into the rows) of its output.
    """
    if is_linear(layer):
        return x.reshape(-1, x.shape[-1])[positions]
    x = _batched(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, padding_list(layer), mode=mode)
    sizes = output_sizes(layer, x.shape[2:])
    image, channel, *steps = padded.stride()
    moved = [s * step for s, step in zip(layer.stride, steps, strict=True)]
    inside = [d * step for d, step in zip(layer.dilation, steps, strict=True)]
    windows = padded.as_strided(
        (len(padded), *sizes, padded.shape[1], *layer.kernel_size),
        (image, *moved, channel, *inside),
        padded.storage_offset(),
    )
    return windows[torch.unravel_index(positions, (len(padded), *sizes))].flatten(1)


def output_rows(layer: Any, y: Tensor, positions: Tensor) -> Tensor:
    """An output of `layer` (or a tensor of its shape) at `positions`: ``[len(positions), C_out]``."""
    if is_linear(layer):
        return y.reshape(-1, y.shape[-1])[positions]
    channels_last = _batched(layer, y).movedim(1, -1)
    return channels_last[torch.unravel_index(positions, channels_last.shape[:-1])]


def output_positions(layer: Any, y: Tensor) -> int:
    """Number of positions of an output of `layer`: images times pixels."""
    channels = y.shape[-1] if is_linear(layer) else _batched(layer, y).shape[1]
    return y.numel() // channels


def _batched(layer: Any, x: Tensor) -> Tensor:
    """A convolution also takes a single example, without the dimension of the batch."""
    return x if x.dim() == spatial_dims(layer) + 2 else x[None]
