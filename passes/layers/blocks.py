"""Equation 17: a layer as one block of filters for each group, ``P_outᵀ · diag(W_1 … W_G) · P_in · x``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def in_blocks(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    parts: Iterable[tuple[int, Tensor, Tensor, Tensor | None]],
    places: Tensor,
    spatial_dims: int,
) -> Tensor:
    """Gather what each group reads, compute its block, and put its filters in their places.

    Args:
        compute: a function of an input, a weight ``[filters, inputs, *kernel]`` and a bias or None.
        x: padded, ``[…, C_in, *sizes]``.
        parts: of each group how many filters it has, the channels that it reads, its weight and its bias. A group that
            reads nothing yields its bias, or 0. One must read something.
        places: where each filter lies among the results of the groups, int64 ``[C_out]``.
        spatial_dims: number of dimensions behind the channels.

    Returns:
        ``[…, C_out, *sizes′]``.
    """
    dim = -1 - spatial_dims
    parts = list(parts)
    outputs = [
        compute(x.index_select(dim, read), weight, bias) if len(read) else None for _, read, weight, bias in parts
    ]
    some = next(output for output in outputs if output is not None)
    blocks = [
        _constant(some, dim, filters, bias) if output is None else output
        for output, (filters, _, _, bias) in zip(outputs, parts, strict=True)
    ]
    return torch.cat(blocks, dim).index_select(dim, places)


def _constant(like: Tensor, dim: int, filters: int, bias: Tensor | None) -> Tensor:
    """What a group without inputs yields at the positions of another group's result `like`."""
    zero = torch.zeros_like(like.narrow(dim, 0, 1))  # torch.fx can trace it
    zeros = torch.cat([zero] * filters, dim)
    return zeros if bias is None else zeros + bias.view(-1, *[1] * (-1 - dim))
