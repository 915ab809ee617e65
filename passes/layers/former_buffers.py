"""The structure of a grouped layer as earlier versions kept it: in buffers, which state dicts and pickles still have.

- ``filters`` ``[C_out]``: the filters of each group, side by side;
- ``inputs`` ``[Σ m_g]``: what each group reads, one after the other;
- ``block_sizes`` ``[groups, 2]``: how many filters and inputs each group has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from passes.errors import InputError
from passes.layers.plan import LayerPlan, LayerShape

BUFFERS = ("filters", "inputs", "block_sizes")


def former_structure(buffers: Mapping[str, Any], shape: LayerShape, ratio: float | None = None) -> LayerPlan:
    """The structure that these buffers stand for.

    Args:
        buffers: the three, by name, on any device.
        shape: of the dense layer.
        ratio: the requested one; None: what is pruned.

    Raises:
        InputError: they are not the structure of such a layer.
    """
    try:
        filters, inputs, sizes = (_numbers(name, buffers.get(name)) for name in BUFFERS)
        _check(filters, inputs, sizes, shape)
        groups = torch.arange(len(sizes), device="cpu")
        labels = torch.empty(len(filters), dtype=torch.int64, device="cpu")
        labels[filters] = torch.repeat_interleave(groups, sizes[:, 0])
        keep = torch.zeros(len(sizes), shape[1], dtype=torch.bool, device="cpu")
        keep[torch.repeat_interleave(groups, sizes[:, 1]), inputs] = True
        if keep.sum(1).tolist() != sizes[:, 1].tolist():
            raise InputError("a group reads an input twice")
        pruned = 1 - int((keep.sum(1) * sizes[:, 0]).sum()) / (shape[1] * shape[2])
        return LayerPlan(*shape, labels, keep, pruned if ratio is None else ratio)
    except InputError as error:
        raise InputError(f"filters, inputs and block_sizes make no structure of it: {error}") from error


def _numbers(name: str, given: object) -> Tensor:
    """One of the buffers on the CPU."""
    if not isinstance(given, Tensor):
        raise InputError(f"there is no {name}")
    if given.dtype != torch.int64 or given.layout is not torch.strided or given.is_meta:
        raise InputError(f"{name} is {given.dtype}".replace("torch.", "") + ", not int64 with values")
    return given.cpu()


def _check(filters: Tensor, inputs: Tensor, sizes: Tensor, shape: LayerShape) -> None:
    """Refuse numbers that nothing could be made of."""
    if (filters.dim(), inputs.dim(), sizes.dim()) != (1, 1, 2) or sizes.shape[1] != 2:
        raise InputError(f"they have the shapes {', '.join(str(list(x.shape)) for x in (filters, inputs, sizes))}")
    whole = [len(filters), len(inputs)]
    # Each by itself first: sums of large numbers overflow.
    if not bool(((sizes >= 0) & (sizes <= torch.tensor(whole))).all()) or sizes.sum(0).tolist() != whole:
        raise InputError("the sizes of its blocks are others")
    if sorted(filters.tolist()) != list(range(shape[2])):
        raise InputError(f"its filters are not those from 0 to {shape[2] - 1}, each once")
    if len(inputs) and not 0 <= int(inputs.min()) <= int(inputs.max()) < shape[1]:
        raise InputError(f"its inputs are not from 0 to {shape[1] - 1}")
