"""Unfolding: a convolution at sampled positions as a matrix product, for any number of dimensions.

A row of the result is what one output position reads: ``C_in`` channels times the kernel, in the order of the flattened
weight ``[C_out, C_in · kernel]``. Positions count over images and output pixels, image after image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def input_rows(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """What `layer` reads at `positions`: ``[len(positions), C_in · kernel]``.

    Args:
        layer: a dense or grouped convolution or linear layer.
        x: its input, ``[N, C_in, *size]`` (linear: ``[…, C_in]``).
        positions: int64, into the ``N · output pixels`` (linear: into the rows) of its output.
    """
    kernel = getattr(layer, "kernel_size", None)
    if kernel is None:
        return x.reshape(-1, x.shape[-1])[positions]
    x = _batched(layer, x)
    padding = layer._pad if hasattr(layer, "_pad") else layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, padding, mode=mode)
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, layer.stride, layer.dilation, strict=True)
    ]
    image, channel, *steps = padded.stride()
    moved = [s * step for s, step in zip(layer.stride, steps, strict=True)]
    inside = [d * step for d, step in zip(layer.dilation, steps, strict=True)]
    windows = padded.as_strided(
        (len(padded), *sizes, padded.shape[1], *kernel), (image, *moved, channel, *inside), padded.storage_offset()
    )
    return windows[torch.unravel_index(positions, (len(padded), *sizes))].flatten(1)


def output_rows(layer: Any, y: Tensor, positions: Tensor) -> Tensor:
    """An output of `layer` (or a tensor of its shape) at `positions`: ``[len(positions), C_out]``."""
    if getattr(layer, "kernel_size", None) is None:
        return y.reshape(-1, y.shape[-1])[positions]
    channels_last = _batched(layer, y).movedim(1, -1)
    return channels_last[torch.unravel_index(positions, channels_last.shape[:-1])]


def output_positions(layer: Any, y: Tensor) -> int:
    """Number of positions of an output of `layer`: images times pixels."""
    channels = y.shape[-1] if getattr(layer, "kernel_size", None) is None else _batched(layer, y).shape[1]
    return y.numel() // channels


def _batched(layer: Any, x: Tensor) -> Tensor:
    """A convolution also takes a single example, without the dimension of the batch."""
    return x if x.dim() == len(layer.kernel_size) + 2 else x[None]
