"""From blocks of weights to the tables the kernel reads: pure tensor functions, independent of the picture's size.

A layer is a list of `Block`: filters that read the same inputs. A dense layer is one block, a grouped layer has one per
group, a depthwise one has a block per channel. The kernel computes up to `most_filters` filters at once, so blocks are
cut into pieces of nearly equal size; pieces of a block share its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from passes.errors import InputError
from passes.kernel.layout.geometry import Geometry

# Columns of `Tables.blocks`: filters, inputs, first input, first filter, first weight, work of all pieces before.
BLOCK_FIELDS = 6


@dataclass(frozen=True, eq=False)
class Block:
    """Filters that read the same inputs.

    Attributes:
        filters: int64 ``[n]``, where their results go.
        inputs: int64 ``[m]``, the channels they read; m may be 0.
        weight: ``[n, m, kernel height, kernel width]``.
    """

    filters: Tensor
    inputs: Tensor
    weight: Tensor


class Structure(NamedTuple):
    """What a plan has to know of a layer's tables.

    Attributes:
        pieces: how many there are.
        depthwise: whether each is one filter of one input.
        bounded: whether inputs are kept between ends.
    """

    pieces: int
    depthwise: bool = False
    bounded: bool = False


class Tables(NamedTuple):
    """A packed layer.

    Attributes:
        weight: fp32, per piece ``[inputs, taps, filters]``, one after the other.
        bias: fp32 ``[out_channels]``, in the order of `filters`.
        inputs: int64, the inputs of each block, one after the other.
        ends: fp32 ``[in_channels, 2]``, the least and the largest number that each input counts as, or empty.
        filters: int64 ``[out_channels]``, the filters of each piece, one after the other.
        blocks: int64 ``[pieces + 1, BLOCK_FIELDS]``; the last row only closes the sums.
    """

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    ends: Tensor
    filters: Tensor
    blocks: Tensor

    def structure(self) -> Structure:
        """What a plan has to know of them."""
        return Structure(len(self.blocks) - 1, bool((self.blocks[:-1, :2] == 1).all()), self.ends.numel() > 0)


def pack(
    blocks: Sequence[Block], bias: Tensor | None, geometry: Geometry, most_filters: int, ends: Tensor | None = None
) -> Tables:
    """Pack blocks for micro-kernels of up to `most_filters` filters.

    Filters that no block computes yield their bias alone.
    """
    blocks = [*blocks, *_idle(blocks, geometry)]
    _check(blocks, bias, geometry, ends)
    pieces: list[tuple[int, ...]] = []
    weights, first_input, first_filter, first_weight, work = [], 0, 0, 0, 0
    for block in blocks:
        reads = len(block.inputs)
        for part in _cut(block.weight.flatten(2), most_filters):  # [filters, inputs, taps]
            pieces.append((len(part), reads, first_input, first_filter, first_weight, work))
            weights.append(part.permute(1, 2, 0).flatten())
            first_filter += len(part)
            first_weight += part.numel()
            # Loading a row of pixels costs about as much as half a filter; starting and storing, a few rows.
            work += part[0].numel() * (2 * len(part) + 1) + 8 * len(part)
        first_input += reads
    pieces.append((0, 0, first_input, first_filter, first_weight, work))
    filters = torch.cat([block.filters for block in blocks])
    bias = torch.zeros(geometry.out_channels) if bias is None else bias.detach()
    return Tables(
        weight=torch.cat(weights).float().contiguous(),
        bias=bias.float()[filters].contiguous(),
        inputs=torch.cat([block.inputs for block in blocks]).contiguous(),
        ends=torch.empty(0) if ends is None else ends.detach().float().contiguous(),
        filters=filters.contiguous(),
        blocks=torch.tensor(pieces, dtype=torch.int64),
    )


def _idle(blocks: Sequence[Block], geometry: Geometry) -> list[Block]:
    """The block of the filters that no other block computes."""
    idle = torch.ones(geometry.out_channels, dtype=torch.bool)
    for block in blocks:
        idle[block.filters[(block.filters >= 0) & (block.filters < geometry.out_channels)]] = False
    filters = idle.nonzero()[:, 0]
    nothing = torch.zeros(len(filters), 0, *geometry.kernel_size)
    return [Block(filters, filters[:0], nothing)] if len(filters) else []


def _cut(weight: Tensor, most: int) -> tuple[Tensor, ...]:
    return weight.tensor_split(-(-len(weight) // most)) if len(weight) else ()


def _check(blocks: Sequence[Block], bias: Tensor | None, geometry: Geometry, ends: Tensor | None) -> None:
    for index, block in enumerate(blocks):
        expected = (len(block.filters), len(block.inputs), *geometry.kernel_size)
        if block.weight.shape != expected:
            raise InputError(f"the weight of block {index} must be {list(expected)}, not {list(block.weight.shape)}")
        if block.weight.dtype != torch.float32:
            raise InputError(
                f"the kernel computes in fp32, block {index} has {block.weight.dtype} weights: call .float()"
            )
        if len(block.inputs) and not 0 <= int(block.inputs.min()) <= int(block.inputs.max()) < geometry.in_channels:
            raise InputError(f"block {index} reads inputs outside 0 … {geometry.in_channels - 1}")
    filters = torch.cat([block.filters for block in blocks]) if blocks else torch.empty(0, dtype=torch.int64)
    if not torch.equal(filters.sort().values, torch.arange(geometry.out_channels)):
        raise InputError(
            f"every filter of 0 … {geometry.out_channels - 1} must be in one block, found {filters.tolist()}"
        )
    if bias is not None and bias.shape != (geometry.out_channels,):
        raise InputError(f"the bias must be [{geometry.out_channels}], not {list(bias.shape)}")
    if ends is not None and ends.shape != (geometry.in_channels, 2):
        raise InputError(f"the ends must be [{geometry.in_channels}, 2], not {list(ends.shape)}")
    if ends is not None and any(geometry.padding):
        raise InputError("inputs can only be kept between ends where nothing is padded: a zero would not stay one")
