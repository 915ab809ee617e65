"""Centroid-based pruning: truncate the smallest centroid entries of a layer (the paper's eq. 9 to 14).

The entries ``μ[g, c]`` are sorted ascending by (value, group, channel); an entry stands for the ``|g|`` connections of
its group to input ``c``. As many are truncated as bring the share of pruned connections nearest to the requested ratio.
At least one entry of a layer is kept, and at ratio 0 none is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.compression.grouping import GROUPS, Groups
from passes.compression.selection import REASONS, TARGETS
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.plan import LayerPlan
from passes.options.ranges import checked_ratio

PLANS = Fact[dict[str, LayerPlan]]("plans")  # of every layer, by module path


def truncate(centroids: Tensor, sizes: Tensor, ratio: float) -> Tensor:
    """Decide which (group, input) connections a layer keeps (eq. 9 to 13).

    Args:
        centroids: ``[groups, C_in]``, the mean importance of each input to each group.
        sizes: int64 ``[groups]``, the number of filters ``|g|`` of each group, none of them 0.
        ratio: share of the connections to prune, in [0, 1).

    Returns:
        bool ``[groups, C_in]``: True where the connection is kept.

    >>> truncate(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), torch.tensor([1, 3]), ratio=0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    ratio = checked_ratio(ratio, "ratio")
    groups, inputs = centroids.shape
    order = torch.argsort(centroids.flatten(), stable=True)  # row-major: ties stay in the order (group, channel)
    pruned = torch.cumsum(sizes.repeat_interleave(inputs)[order], 0)
    pruned = torch.cat([pruned.new_zeros(1), pruned[:-1]])  # by number of truncated entries; all of them is too many
    requested = ratio * int(sizes.sum()) * inputs
    count = int(torch.argmin((pruned.double() - requested).abs()))
    keep = torch.ones(groups * inputs, dtype=torch.bool, device=centroids.device)
    keep[order[:count]] = False
    return keep.view(groups, inputs)


class Pruning(Pass):
    """Make the plan of every layer: what a target keeps, or the reason why a layer is left alone.

    Args:
        limit: no layer is pruned beyond this share (a `Pruner` raises it step by step).
    """

    name = "pruning"
    requires = (TARGETS, REASONS, GROUPS)
    ensures = (PLANS,)

    def __init__(self, limit: float = 1.0) -> None:
        """Take the limit."""
        self.limit = limit

    def run(self, compilation: Compilation) -> Facts:
        """Truncate every target layer at its ratio, or at the limit where that is lower."""
        targets, reasons, groups = compilation[TARGETS], compilation[REASONS], compilation[GROUPS]
        plans = {}
        for path, layer in compilation.model.named_modules():
            if path in targets:
                plans[path] = self._plan(layer, groups[path], targets[path].ratio)
            elif path in reasons:
                plans[path] = LayerPlan.of(layer, reason=reasons[path])
        return {PLANS: plans}

    def _plan(self, layer: nn.Module, found: Groups, ratio: float) -> LayerPlan:
        ratio = min(self.limit, ratio)
        keep = truncate(found.centroids, torch.bincount(found.labels), ratio)
        return LayerPlan.of(layer, labels=found.labels, keep=keep, requested_ratio=ratio)

    def check(self, compilation: Compilation) -> str | None:
        """Every target keeps something and misses its ratio by at most one centroid entry."""
        for path in compilation[TARGETS]:
            plan = compilation[PLANS][path]
            entry = max(filters for filters, _ in plan.block_sizes) / plan.out_channels / plan.in_channels
            if not plan.connections or abs(plan.achieved_ratio - (plan.requested_ratio or 0)) > entry:
                return f"layer {path!r} was pruned to {plan.achieved_ratio:.4f} instead of {plan.requested_ratio}"
        return None
