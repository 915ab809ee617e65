"""The plain data that passes exchange: what was asked for, and what each pass finds out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

Criterion = Literal["l1", "l2"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What is asked of one layer: at most `groups` groups, and the share `ratio` of its connections pruned."""

    groups: int
    ratio: float


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked by `passes.settings.checked_settings`.

    Attributes:
        groups: groups per layer, at most.
        ratio: share of the connections of each layer that is pruned, in [0, 1).
        linear_ratio: the same for linear layers; None means `ratio`.
        ignore: names and glob patterns of modules to leave alone, with everything below them.
        overrides: names or patterns of layers, with their own ``groups`` and ``ratio``.
        criterion: ``"l1"``, ``"l2"`` or a callable from the weight to an importance ``[C_out, C_in]``.
        seed: seed of the clustering.
        example_inputs: positional arguments of the model's forward, to check and to know shapes; None if not given.
    """

    groups: int = 8
    ratio: float = 0.0
    linear_ratio: float | None = None
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    criterion: Criterion = "l1"
    seed: int = 0
    example_inputs: tuple[object, ...] | None = None


@dataclass(frozen=True)
class Region:
    """A part of the model that torch.fx can trace: the path of its root, and a graph for each mode."""

    path: str
    graphs: dict[str, fx.GraphModule]


@dataclass(frozen=True)
class Groups:
    """The groups of one layer: int64 labels ``[C_out]`` and float64 centroids ``[groups, C_in]``."""

    labels: Tensor
    centroids: Tensor
