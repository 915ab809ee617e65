"""Thresholds: a norm and a ReLU before layers that see no padding become a comparison within these layers.

``relu(s·x + t) = s · max(x, −t/s) + t`` for s > 0, and with the minimum for s < 0; ReLU6 is bounded on both sides. The
scale goes into the weights of the layers that read the result, and ``Σ_taps w · t`` into their biases: exact where a
layer sees a pixel at every tap, so where it pads with no zeros. The kernel compares as it loads; for the library, a
comparison is as fast as copying the tensor, a third of the time that a norm and a ReLU take.

What a channel below its threshold adds, ``w · (s · (−t/s) + t)``, is 0 but for rounding, which grows with t: a norm
with a shift beyond `MOST_SHIFT` stays as it is. Where s is 0, or so small that −t/s is no number, the channel is a
constant: w · s becomes 0, and t becomes what the activation makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from passes.freezing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.constants import absorbed, pads_with_zeros, reader_of, reads_channels
from passes.tracing.mutation import is_unchanged

HIGHEST = {"relu": torch.inf, "relu6": 6.0}
LEAST_SCALE = 1e-30
MOST_SHIFT = 100.0


def thresholds(scale: Tensor, shift: Tensor, highest: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ends of x and the scale and shift of ``clamp(scale·x + shift, 0, highest) = s·clamp(x, low, high) + t``.

    All are float64 ``[C]``.
    """
    tiny = scale.abs() < LEAST_SCALE
    s = torch.where(tiny, 0.0, scale)
    t = torch.where(tiny, shift.clamp(0, highest), shift)
    ends = torch.stack([-shift, highest - shift]) / scale
    low = torch.where(tiny, -torch.inf, ends.min(0).values)
    high = torch.where(tiny, torch.inf, ends.max(0).values)
    return low, high, s, t


def use_thresholds(graph: fx.GraphModule) -> int:
    """Move norms and activations of a fused graph into the layers that read them, in place; return how many."""
    count = 0
    for node in graph.graph.nodes:
        norm = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, FusedNorm) and _may_move(norm):
            readers = [reader_of(graph, user, node) for user in node.users]
            dims = node.meta["val"].dim() - 2
            same = all(is_unchanged(graph, node.all_input_nodes[0], node, user) for user in node.users)
            if same and all(reader is not None and _may_read(reader, dims) for reader in readers):
                _move(norm, [each for each in readers if each is not None])
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
                count += 1
    return count


def _may_move(norm: FusedNorm) -> bool:
    precise = norm.scale.dtype in (torch.float32, torch.float64)
    return precise and norm.activation in HIGHEST and bool(norm.shift.abs().max() <= MOST_SHIFT)


def _may_read(reader: Recipe, dims: int) -> bool:
    return reads_channels(reader.layer, dims) and not pads_with_zeros(reader.layer)


def _move(norm: FusedNorm, readers: list[Recipe]) -> None:
    """Move a norm and its activation into its readers."""
    low, high, scale, shift = thresholds(norm.scale.double(), norm.shift.double(), HIGHEST[str(norm.activation)])
    channels = torch.arange(len(scale), device=scale.device)
    for reader in readers:
        reader.add(absorbed(reader.weight(), channels, shift))
        reader.scale_inputs(scale)
        reader.ends = torch.stack([low, high], 1).to(norm.scale.dtype)
