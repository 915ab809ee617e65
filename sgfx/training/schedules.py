"""Learning rates by epoch, made of torch's schedulers.

With epochs ``e`` counted from 1 to ``E``, a base rate ``lr`` and no warm-up:

- ``"constant"``: ``lr``;
- ``"cosine"``: ``lr · (1 + cos(π · (e − 1) / E)) / 2``, from ``lr`` down to nearly nothing in the last epoch;
- epochs ``(m₁, m₂, …)``: ``lr / 10ᵏ``, where ``k`` of them are over (``mᵢ < e``). The paper's ``(100, 150)`` trains
  100 epochs at ``lr``, 50 at a tenth and the rest at a hundredth of it.

``W`` epochs of warm-up go up in equal steps, ``lr · e / (W + 1)``. The cosine falls in the epochs after them;
milestones are counted from the start of training as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from passes.errors import InputError
from passes.options import is_integer

Shape: TypeAlias = Literal["constant", "cosine"]
Schedule: TypeAlias = Shape | Sequence[int]


def checked_schedule(schedule: Schedule, epochs: int, warmup: int = 0) -> Shape | tuple[int, ...]:
    """Return `schedule` in a form that later changes to a list don't reach.

    Raises:
        InputError: it is no known name, or its epochs are not ascending integers from 1; there is more warm-up than
            there are epochs, or lr is to be divided in it.
        TypeError: it is neither a name nor a sequence.
    """
    if warmup >= epochs:
        raise InputError(f"warmup ({warmup} epochs) must be shorter than training ({epochs} epochs)")
    choices = ", ".join(map(repr, get_args(Shape))) + " or the epochs after which lr is divided by ten, as (100, 150)"
    if isinstance(schedule, str):
        if schedule not in get_args(Shape):
            raise InputError(f"unknown schedule {schedule!r}; choose {choices}")
        return schedule
    if not isinstance(schedule, Sequence):
        raise TypeError(f"schedule must be {choices}, not {schedule!r}")
    if not all(map(is_integer, schedule)) or any(later <= earlier for earlier, later in pairwise((0, *schedule))):
        raise InputError(f"the epochs of a schedule must be integers from 1, each after the last, not {schedule!r}")
    milestones = tuple(int(epoch) for epoch in schedule)
    if milestones and milestones[0] <= warmup:
        raise InputError(f"lr is divided after epoch {milestones[0]}, within the {warmup} epochs of warm-up")
    return milestones


def scheduler(optimizer: Optimizer, schedule: Shape | tuple[int, ...], epochs: int, warmup: int = 0) -> LRScheduler:
    """The scheduler of a checked schedule; it is stepped after every epoch."""
    rest: LRScheduler
    if isinstance(schedule, tuple):
        rest = MultiStepLR(optimizer, [epoch - warmup for epoch in schedule])
    elif schedule == "cosine":
        rest = CosineAnnealingLR(optimizer, epochs - warmup)
    else:
        rest = ConstantLR(optimizer, 1.0, 1)
    if not warmup:
        return rest
    first = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [first, rest], [warmup])
