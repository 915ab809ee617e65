"""Learning rates by epoch, as a pure function.

With epochs ``e`` counted from 1 to ``E`` and a base rate ``lr``:

- ``"constant"``: ``lr``;
- ``"cosine"``: ``lr · (1 + cos(π · (e − 1) / E)) / 2``, from ``lr`` down to nearly nothing in the last epoch;
- epochs ``(m₁, m₂, …)``: ``lr / 10ᵏ``, where ``k`` of them are over (``mᵢ < e``). The paper's ``(100, 150)`` trains
  100 epochs at ``lr``, 50 at a tenth and the rest at a hundredth of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Literal, TypeAlias, get_args

from passes.errors import InputError

Shape: TypeAlias = Literal["constant", "cosine"]
Schedule: TypeAlias = Shape | Sequence[int]


def checked_schedule(schedule: Schedule) -> Shape | tuple[int, ...]:
    """Return `schedule` in a form that later changes to a list don't reach.

    Raises:
        InputError: it is no known name, or its epochs are not ascending integers from 1.
        TypeError: it is neither a name nor a sequence.
    """
    choices = ", ".join(map(repr, get_args(Shape))) + " or the epochs after which lr is divided by ten, as (100, 150)"
    if isinstance(schedule, str):
        if schedule not in get_args(Shape):
            raise InputError(f"unknown schedule {schedule!r}; choose {choices}")
        return schedule
    if not isinstance(schedule, Sequence):
        raise TypeError(f"schedule must be {choices}, not {schedule!r}")
    integers = all(isinstance(epoch, Integral) and not isinstance(epoch, bool) for epoch in schedule)
    if not integers or any(later <= earlier for earlier, later in pairwise((0, *schedule))):
        raise InputError(f"the epochs of a schedule must be integers from 1, each after the last, not {schedule!r}")
    return tuple(int(epoch) for epoch in schedule)


def learning_rate(schedule: Shape | tuple[int, ...], lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of `epoch` (from 1) of `epochs` under a checked schedule with base rate `lr`."""
    if isinstance(schedule, tuple):
        return lr / 10.0 ** sum(milestone < epoch for milestone in schedule)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
    return lr
