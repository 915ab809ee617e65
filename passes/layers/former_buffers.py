"""The structure of a grouped layer as earlier versions kept it: in buffers, which state dicts and pickles still have.

- ``filters`` ``[C_out]``: the filters of each group, side by side;
- ``inputs`` ``[Σ m_g]``: what each group reads, one after the other;
- ``block_sizes`` ``[groups, 2]``: how many filters and inputs each group has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from passes.errors import InputError
from passes.layers.plan import LayerPlan, LayerShape

BUFFERS = ("filters", "inputs", "block_sizes")


def former_structure(buffers: Mapping[str, Tensor], shape: LayerShape, ratio: float | None = None) -> LayerPlan:
    """The structure that these buffers stand for.

    Args:
        buffers: the three, by name, on any device.
        shape: of the dense layer.
        ratio: the requested one; None: what is pruned.

    Raises:
        InputError: they are not the structure of such a layer.
    """
    try:
        filters, inputs, sizes = (buffers[name].cpu() for name in BUFFERS)
        if sizes.sum(0).tolist() != [len(filters), len(inputs)] or len(filters) != shape[2]:
            raise ValueError("the sizes of its blocks are others")
        groups = torch.arange(len(sizes), device="cpu")
        labels = torch.full((shape[2],), -1, device="cpu")
        labels[filters] = torch.repeat_interleave(groups, sizes[:, 0])
        keep = torch.zeros(len(sizes), shape[1], dtype=torch.bool, device="cpu")
        keep[torch.repeat_interleave(groups, sizes[:, 1]), inputs] = True
        pruned = 1 - int((keep.sum(1) * sizes[:, 0]).sum()) / (shape[1] * shape[2])
        return LayerPlan(*shape, labels, keep, pruned if ratio is None else ratio)
    except (KeyError, TypeError, RuntimeError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"filters, inputs and block_sizes make no structure of it: {error}") from error
