"""The stopwatch: the one place where time is measured. It has to tell which way is fastest on a busy machine, too.

1. Ways are timed in turn, round by round, and each by its least time: others can only make a call longer.
2. Times are settled once most calls of each way take about as long as its fastest one, and no thread waited for a core.
   Rounds go on until they are, or the time for it is up: little is wasted on a quiet machine, and on a busy one every
   way gets its chance of a call that nobody disturbs.
3. Of ways whose times are within a margin the simpler one wins, so that two measurements decide alike.
4. How noisy the machine was is told by how long the threads waited for a core, where the system says it (Linux), and by
   how far the times of a fixed piece of work on all threads spread.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 60
SECONDS = 0.12  # that the rounds of one way may take as long as times are not settled
SETTLED = 1.1  # the median of the times over the least
MARGIN = 1.05  # of the fastest, within which the simpler way wins
SIZE = 320  # of the matrices whose product is the fixed piece of work, a few hundred µs
SAMPLES = 3  # of it, before each race
MOST_SPREAD, MOST_WAITING = 2.0, 0.1  # beyond which measurements are not to be relied on
THREADS = Path("/proc/self/task")


class Stopwatch:
    """Races ways of doing the same, and remembers how noisy the machine was meanwhile."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._matrix = torch.ones(SIZE, SIZE, dtype=torch.float32, device="cpu")
        self._samples: list[float] = []
        self._waited = self._raced = 0.0

    def race(self, ways: Mapping[str, Callable[[], object]], patience: float = 1.0) -> dict[str, float]:
        """Return the milliseconds that a call of each way takes at least.

        Args:
            ways: what to time, by name.
            patience: how many times as long as usual it may take.
        """
        for way in ways.values():  # allocates, compiles, and fills the caches
            way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        waited, start = _seconds_waited(), time.perf_counter()
        self._samples += [_seconds(lambda: torch.mm(self._matrix, self._matrix)) for _ in range(SAMPLES)]
        end = start + patience * SECONDS * len(ways)
        for number in range(MOST_ROUNDS):
            for name, way in ways.items():
                times[name].append(_seconds(way))
            taken, waiting = time.perf_counter() - start, _seconds_waited() - waited
            settled = all(map(_agree, times.values())) and waiting <= MOST_WAITING * taken
            if number + 1 >= LEAST_ROUNDS and (settled or start + taken > end):
                break
        self._waited += waiting
        self._raced += taken
        return {name: 1000 * min(each) for name, each in times.items()}

    @property
    def spread(self) -> float:
        """The upper quartile of the times of the fixed piece of work over the least; about 1 on a quiet machine."""
        samples = sorted(self._samples)
        return samples[3 * len(samples) // 4] / samples[0] if samples else 1.0

    @property
    def waiting(self) -> float:
        """Seconds that threads waited for a core, in each second of the races; 0 where the system does not say it."""
        return self._waited / self._raced if self._raced else 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether what was measured is not to be relied on."""
        return self.spread > MOST_SPREAD or self.waiting > MOST_WAITING

    def complaint(self) -> str:
        """What is to be said about measurements on a noisy machine; "" on a quiet one."""
        if not self.is_noisy:
            return ""
        return (
            f"the machine was busy: threads waited for a core for {self.waiting:.2f} s in each second, and the times "
            f"of one piece of work spread by {self.spread:.1f}. So nothing of this is kept with the model: freeze it "
            "again when the machine is quiet"
        )


def fastest(times: Mapping[str, float]) -> str:
    """The first way, in order of simplicity, that is within the margin of the fastest."""
    least = min(times.values())
    return next(name for name, each in times.items() if each <= MARGIN * least)


def _agree(times: list[float]) -> bool:
    return statistics.median(times) <= SETTLED * min(times)


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _seconds_waited() -> float:
    """How long the threads of this process have been ready to run and had no core."""
    waited = 0
    for thread in THREADS.iterdir() if THREADS.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended, or the system counts no waits
            waited += int((thread / "schedstat").read_text().split()[1])
    return waited / 1e9
