"""Self-grouping: k-means over the importance vectors of a layer's filters (the paper's eq. 7, 8).

Restarts pay on small layers, which are cheap, and not on large ones: each layer gets as many k-means++ restarts as fit
a budget of arithmetic, between one and ten. Labels are numbered by first appearance, so equal partitions have equal
labels. Equal filters can leave fewer groups than asked for; the groups found are what counts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController
from torch import Tensor

from passes.compression.importance import IMPORTANCE
from passes.compression.selection import TARGETS
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.options.ranges import checked_integer
from passes.options.settings import SETTINGS

MAX_RESTARTS = 10
RESTART_BUDGET = 4_000_000  # multiply-adds of one k-means iteration (C_out · C_in · groups) times restarts


@dataclass(frozen=True)
class Groups:
    """The groups of one layer: int64 labels ``[C_out]`` and float64 centroids ``[groups, C_in]``."""

    labels: Tensor
    centroids: Tensor


GROUPS = Fact[dict[str, Groups]]("groups")


def group_filters(importance: Tensor, groups: int, seed: int = 0) -> Groups:
    """Partition the filters of a layer into at most `groups` groups of similar importance vectors (eq. 7, 8).

    Args:
        importance: ``[C_out, C_in]`` on the CPU, finite.
        groups: number of groups, at least 1; more than C_out is clipped.
        seed: seed of the clustering. No global random state is read or changed.

    Returns:
        Labels 0, 1, … in the order of first appearance, and the mean importance vector of each group. There are fewer
        groups than asked for when fewer filters differ.

    >>> group_filters(torch.tensor([[9.0, 0.0], [0.0, 9.0], [8.0, 0.0]]), groups=2).labels
    tensor([0, 1, 0])
    """
    filters, inputs = importance.shape
    groups = min(checked_integer(groups, "groups", least=1), filters)
    means = KMeans(groups, n_init=restarts(filters, inputs, groups), random_state=seed)
    # One thread: sums then have one order on every machine, and layers are too small for more to pay.
    with warnings.catch_warnings(), _threadpools().limit(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct filters than groups: reported, not warned
        found = torch.from_numpy(means.fit_predict(_scaled(importance).numpy())).long()
    labels = _in_order_of_appearance(found)
    return Groups(labels, centroids(importance, labels))


@cache
def _threadpools() -> ThreadpoolController:
    """The thread pools of this process; finding them takes milliseconds."""
    return ThreadpoolController()


def _scaled(importance: Tensor) -> Tensor:
    """Importance times a power of two, so that squares neither overflow nor vanish; the partition stays the same."""
    exponent = int(torch.frexp(importance.max()).exponent)
    return importance * 2.0 ** -max(-100, min(exponent, 100))


def restarts(filters: int, inputs: int, groups: int) -> int:
    """Number of k-means++ restarts for a layer: ten where it is small, fewer as it grows."""
    return max(1, min(MAX_RESTARTS, RESTART_BUDGET // (filters * inputs * groups)))


def centroids(importance: Tensor, labels: Tensor) -> Tensor:
    """Mean importance vector of each group, float64 ``[groups, C_in]`` (the μ of eq. 7, 8)."""
    sizes = torch.bincount(labels)
    sums = torch.zeros(len(sizes), importance.shape[1], dtype=torch.float64, device=importance.device)
    return sums.index_add_(0, labels, importance.double()) / sizes[:, None]


def _in_order_of_appearance(labels: Tensor) -> Tensor:
    number: dict[int, int] = {}
    return torch.tensor([number.setdefault(label, len(number)) for label in labels.tolist()], device=labels.device)


class Grouping(Pass):
    """Find the groups of every target layer."""

    name = "grouping"
    requires = (SETTINGS, TARGETS, IMPORTANCE)
    ensures = (GROUPS,)

    def run(self, compilation: Compilation) -> Facts:
        """Cluster the filters of every target layer, each with a generator of its own."""
        vectors, seed = compilation[IMPORTANCE], compilation[SETTINGS].seed
        targets = compilation[TARGETS].items()
        return {GROUPS: {path: group_filters(vectors[path], target.groups, seed) for path, target in targets}}

    def check(self, compilation: Compilation) -> str | None:
        """Every filter is in exactly one group, and there are no more groups than asked for."""
        for path, target in compilation[TARGETS].items():
            found = compilation[GROUPS][path]
            if len(found.labels) != len(compilation[IMPORTANCE][path]) or len(found.centroids) > target.groups:
                return f"layer {path!r} has {len(found.labels)} labels in {len(found.centroids)} groups"
        return None
