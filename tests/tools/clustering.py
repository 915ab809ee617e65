"""How good a clustering is: what k-means minimises."""

from torch import Tensor

from passes.compression.grouping import centroids


def inertia(importance: Tensor, labels: Tensor) -> float:
    """Summed squared distance of the filters to their centroids, the objective of eq. 7, 8."""
    return float((importance.double() - centroids(importance, labels)[labels]).square().sum())
