"""What the caller asked for, as plain data: the options of a compilation, and the criteria that are known by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from passes.infra.compilation import Fact

Criterion = Literal["l1", "l2"] | Callable[[Tensor], Tensor]

NORMS = {"l1": 1, "l2": 2}  # the order of the norm that a criterion names


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked by `passes.options.checks.checked_settings`.

    Attributes:
        groups: groups per layer, at most.
        ratio: share of the connections of each layer that is pruned, in [0, 1).
        linear_ratio: the same for linear layers; None means `ratio`.
        ignore: names and glob patterns of modules to leave alone, with everything below them.
        overrides: names or patterns of layers, with their own ``groups`` and ``ratio``.
        criterion: ``"l1"``, ``"l2"`` or a callable from the weight to an importance ``[C_out, C_in]``.
        seed: seed of the clustering.
        example_inputs: arguments of the model's forward (`passes.options.arguments`), to check and to know shapes;
            None if not given.
        leaf_modules: paths of modules that are not to be traced into.
    """

    groups: int = 8
    ratio: float = 0.0
    linear_ratio: float | None = None
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    criterion: Criterion = "l1"
    seed: int = 0
    example_inputs: tuple[object, ...] | None = None
    leaf_modules: tuple[str, ...] = ()


SETTINGS = Fact[Settings]("settings")
