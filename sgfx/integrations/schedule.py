"""When a callback prunes and lowers: moments of a training loop, counted in its epochs or in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from passes.errors import InputError
from passes.options import checked_integer

Unit = Literal["epochs", "steps"]


@dataclass(frozen=True)
class Moments:
    """The moments of a run: before the first batch of an epoch, or before the batch behind so many optimizer steps.

    Attributes:
        unit: what is counted.
        steps: the moments of the pruning steps, ascending.
        lower: the moment of lowering, not before the last of them.
    """

    unit: Unit
    steps: tuple[int, ...]
    lower: int

    def before(self, now: int) -> tuple[int, int]:
        """The least and the greatest number of pruning steps that are done at `now`: one that is due may be open."""
        return sum(moment < now for moment in self.steps), sum(moment <= now for moment in self.steps)


@dataclass(frozen=True)
class When:
    """What the user said of the moments, before it is known how many steps there are."""

    unit: Unit
    given: int | tuple[int, ...]  # so many apart, from 0 on, or a list
    lower_at: int | None

    @classmethod
    def of(
        cls, every_epochs: int | Sequence[int] | None, every_steps: int | Sequence[int] | None, lower_at: int | None
    ) -> When:
        """Check what was given.

        Raises:
            InputError: not exactly one of the two is given, or it is no number or ascending list of numbers.
            TypeError: a moment is no integer.
        """
        if (every_epochs is None) == (every_steps is None):
            raise InputError("give exactly one of every_epochs and every_steps: when the pruning steps are to happen")
        lower_at = None if lower_at is None else checked_integer(lower_at, "lower_at", least=0)
        unit: Unit = "steps" if every_epochs is None else "epochs"
        name, given = f"every_{unit}", every_steps if every_epochs is None else every_epochs
        if isinstance(given, Sequence) and not isinstance(given, str):
            moments = tuple(checked_integer(moment, f"every entry of {name}", least=0) for moment in given)
            if not moments or any(one >= other for one, other in pairwise(moments)):
                raise InputError(f"{name} must be a number or an ascending list of {unit}, not {given!r}")
            return cls(unit, moments, lower_at)
        return cls(unit, checked_integer(given, name, least=1), lower_at)

    def moments(self, count: int) -> Moments:
        """The moments of a pruner with `count` steps.

        Raises:
            InputError: a list has another length, or lowering would come before the last step.
        """
        given = self.given
        steps = given if isinstance(given, tuple) else tuple(given * index for index in range(count))
        if len(steps) != count:
            raise InputError(
                f"every_{self.unit} lists {len(steps)} moments, and ratio and step make {count} pruning steps: list as "
                "many, or give a number"
            )
        lower = steps[-1] if self.lower_at is None else self.lower_at
        if lower < steps[-1]:
            raise InputError(f"lower_at={lower} comes before the last pruning step, at {steps[-1]} {self.unit}")
        return Moments(self.unit, steps, lower)
