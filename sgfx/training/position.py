"""Where a run stands, and what it has added up since the epoch began."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sgfx.training.tasks.task import Meter


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: the epoch that runs or is next, from 1.
        batch: how many batches of it are done.
        batches: how many are done in all.
        steps: how many steps the optimizer made.
        best: the best result on the validation data, and the epoch in which it was reached.
        stopped: whether training ended before its epochs were over.
    """

    epoch: int = 1
    batch: int = 0
    batches: int = 0
    steps: int = 0
    best: tuple[float, int] | None = None
    stopped: bool = False


@dataclass
class Sums:
    """What one process has added up in an epoch: losses times examples, and what the meter counted."""

    meter: Meter
    losses: Counter[str] = field(default_factory=Counter)
    examples: int = 0

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return {"losses": dict(self.losses), "examples": self.examples, "meter": self.meter.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such data."""
        self.losses, self.examples = Counter(state["losses"]), state["examples"]
        self.meter.load_state(state["meter"])
