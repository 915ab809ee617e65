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

from typing import Any

import torch
from torch import Tensor, fx

from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.constants import absorbed, pads_with_zeros, reader_of, reads_channels
from passes.freezing.rewrites.rewrite import PLAIN_INPUTS, Place, Rule, shape_of
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


class UseThresholds(Rule):
    """Move norms and activations into the layers that read them."""

    name = "use thresholds"
    ends = (PLAIN_INPUTS,)

    def applies(self, place: Place) -> bool:
        """A norm that no layer before it has taken."""
        return isinstance(place.module, FusedNorm)

    def obstacle(self, place: Place) -> str | None:
        """What the norm is, and what reads it."""
        dims = len(shape_of(place.node)) - 2
        reasons = [_norm_obstacle(place.module)]
        reasons += [_reader_obstacle(place, user, dims) for user in place.node.users]
        return next((reason for reason in reasons if reason is not None), None)

    def rewrite(self, place: Place) -> None:
        """Move it."""
        readers = [reader_of(place.graph, user, place.node) for user in place.node.users]
        if isinstance(place.module, FusedNorm):
            _move(place.module, [each for each in readers if each is not None])
        place.node.replace_all_uses_with(place.node.all_input_nodes[0])
        place.graph.graph.erase_node(place.node)


def _norm_obstacle(norm: Any) -> str | None:
    """Why a norm and what is done behind it are no comparison that is precise enough."""
    if norm.activation not in HIGHEST:
        return "no ReLU follows it"
    if norm.scale.dtype not in (torch.float32, torch.float64):
        return "it computes in half precision"
    return f"it shifts by more than {MOST_SHIFT:g}" if bool(norm.shift.abs().max() > MOST_SHIFT) else None


def _reader_obstacle(place: Place, user: fx.Node, dims: int) -> str | None:
    """Why what reads a norm can't compare in its place, where pictures have `dims` dimensions."""
    reader = reader_of(place.graph, user, place.node)
    if reader is None:
        return "what reads it is no layer"
    if not reads_channels(reader.layer, dims):
        return f"the filters of layer {reader.path!r} behind it do not read all channels"
    if pads_with_zeros(reader.layer):
        return f"layer {reader.path!r} behind it pads with zeros"
    if reader.ends is not None:
        return f"layer {reader.path!r} behind it compares already"
    if not is_unchanged(place.graph, place.node.all_input_nodes[0], place.node, user):
        return f"what it reads is changed in place before layer {reader.path!r}"
    return None


def _move(norm: FusedNorm, readers: list[Recipe]) -> None:
    """Move a norm and its activation into its readers."""
    low, high, scale, shift = thresholds(norm.scale.double(), norm.shift.double(), HIGHEST[str(norm.activation)])
    channels = torch.arange(len(scale), device=scale.device)
    for reader in readers:
        reader.add(absorbed(reader.weight(), channels, shift))
        reader.scale_inputs(scale)
        reader.ends = torch.stack([low, high], 1).to(norm.scale.dtype)
