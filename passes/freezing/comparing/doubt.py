"""Doubt: whether what a form of a model gives is off by more than rounding can explain.

What is off by more than rounding (`models.comparing`) may still turn on rounding: a top-k, an argmax, layers that blow
errors up. Inputs that are off by rounding errors show how far the model itself moves; what is off by many times that
is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from passes.infra.random_state import seed_all
from passes.models.comparing import difference, kinds
from passes.models.values import mapped

Inputs = tuple[Any, ...]
Record = dict[str, list[Tensor]]  # what each layer gives, by its path, in the order of execution
NUDGES, NUDGE = 3, 8.0  # how often inputs are moved, and by how many rounding errors
SLACK = 100.0  # a form may be off by so many times what that moves the model


def nudged(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs, off by rounding errors, a few times."""

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        errors = NUDGE * torch.finfo(x.dtype).eps * torch.randn(x.shape, device=x.device)
        return (x * (1 + errors)).to(x.dtype)

    for seed in range(NUDGES):
        seed_all(seed)
        yield mapped(inputs, nudge)


class Expected:
    """What the layers of a model should give for some inputs.

    Args:
        run: gives what they do give, for any inputs.
        inputs: what they are compared for.

    Attributes:
        record: what they give for these.
        unsteady: whether nudged inputs change how many tensors there are, or their shapes.
    """

    def __init__(self, run: Callable[[Inputs], Record], inputs: Inputs) -> None:
        """Run the model on the inputs and on nudged ones."""
        self.record = run(inputs)
        self._moved = [run(each) for each in nudged(inputs)]
        self.unsteady = any(
            kinds(each.get(name, ())) != kinds(wanted) for each in self._moved for name, wanted in self.record.items()
        )

    def differing(self, found: Record) -> str | None:
        """The first layer that is off in `found`, of those that are there and give tensors of the same kinds."""
        for name, wanted in self.record.items():
            given = found.get(name, [])
            if kinds(given) == kinds(wanted) and any(self._beyond(name, given, wanted)):
                return name
        return None

    def _beyond(self, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterator[bool]:
        moved = [each[name] for each in self._moved if kinds(each.get(name, ())) == kinds(wanted)]
        for index, (mine, theirs) in enumerate(zip(given, wanted, strict=True)):
            found = difference(mine, theirs)
            explained = max((difference(each[index], theirs).worst for each in moved), default=0.0)
            yield found.worst > max(found.rounding, SLACK * explained)
