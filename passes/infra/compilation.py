"""The unit of compilation, which the passes read and write one after the other, and what a pass is."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

from passes.errors import PassError
from passes.infra.facts import Groups, Regions, Target
from passes.layers.plan import LayerPlan
from passes.options.settings import Settings

T = TypeVar("T")


class Fact(Generic[T]):
    """An attribute of a unit that some pass writes; reading it before then is an error that names it."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Remember the attribute's name."""
        self.name = name

    def __get__(self, unit: Unit, owner: type | None = None) -> T:
        """Return the fact, or say that no pass has written it yet."""
        if self.name not in unit.__dict__:
            raise PassError(f"no pass has written {self.name!r} yet")
        return cast(T, unit.__dict__[self.name])

    def __set__(self, unit: Unit, value: T) -> None:
        """Write the fact."""
        unit.__dict__[self.name] = value


class Unit:
    """The state of one compilation: the model that is being rewritten, and the facts that passes write.

    Attributes:
        model: the model that is being rewritten.
        settings: what was asked for.
        limit: no layer is pruned beyond this share yet (a `Pruner` raises it step by step).
        regions: the traced parts of the model, and what is known of the rest, by `trace`.
        targets: what is asked of each layer that will be regrouped, keyed by module path, by `selection`.
        reasons: why each other layer is left alone, by `selection`.
        importance: ``[C_out, C_in]`` of each target, by `importance`.
        grouping: labels and centroids of each target, by `grouping`.
        plans: the plan of every layer, by `pruning`.
        channels: who reads which channels of the lowered model, by `channels`.
    """

    regions = Fact[Regions]()
    targets = Fact[dict[str, Target]]()
    reasons = Fact[dict[str, str]]()
    importance = Fact[dict[str, Tensor]]()
    grouping = Fact[dict[str, Groups]]()
    plans = Fact[dict[str, LayerPlan]]()
    channels = Fact[Any]()  # a `Channels`, which stands in a later room

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        """Start with the model and the settings, and no facts."""
        self.model = model
        self.settings = settings
        self.limit = 1.0

    def forget(self, fact: str) -> None:
        """Let go of a fact that nobody needs any more, such as graphs, which hold weights, and each other in cycles."""
        del self.__dict__[fact]
        gc.collect()

    def knows(self, fact: str) -> bool:
        """Whether some pass has written `fact`."""
        return fact in self.__dict__


class Pass(ABC):
    """One step of the compiler. It states which facts of the unit it needs and which it ensures."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, unit: Unit) -> bool:
        """Do the work on `unit`; return whether the model was modified (facts alone do not count)."""

    def check(self, unit: Unit) -> str | None:
        """Return what is wrong with the result, or None. Called by the manager after `run`."""
        return None
