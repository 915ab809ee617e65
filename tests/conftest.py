"""Settings of the whole test run, and the stopwatch by which no test depends."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings

from passes.freezing.choosing.stopwatch import Stopwatch

# The tensors of the tests are small: on a busy machine, threads that wait for each other cost more than they save.
torch.set_num_threads(1)
# How long an example takes says nothing there, either.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Take what is there for good, such as the modules, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@dataclass
class FakeStopwatch:
    """Runs each way once, and says what it was told to say.

    Attributes:
        ms: milliseconds by the name of a way, or by its first word.
        noisy: whether the machine is.
        races: the names of the ways, race by race.
    """

    ms: dict[str, float] = field(
        default_factory=lambda: {
            **{"kernel": 1.0, "dense": 2.0, "channels_last": 3.0, "library": 4.0},
            **{"chosen": 1.0, "library alone": 3.0},
        }
    )
    noisy: bool = False
    races: list[list[str]] = field(default_factory=list)

    def race(self, ways: Mapping[str, Callable[[], object]], patience: float = 1.0) -> dict[str, float]:
        self.races.append(list(ways))
        for way in ways.values():
            way()
        return {name: self.ms.get(name, self.ms.get(name.split()[0], 9.0)) for name in ways}


@pytest.fixture
def real_stopwatch() -> None:
    """For a test that is about time itself."""


@pytest.fixture(autouse=True)
def stopwatch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeStopwatch:
    """What freezing measures with: the kernel is faster than the library, and the machine is quiet."""
    fake = FakeStopwatch()
    if "real_stopwatch" not in request.fixturenames:
        monkeypatch.setattr(Stopwatch, "race", lambda self, ways, patience=1.0: fake.race(ways, patience))
        monkeypatch.setattr(Stopwatch, "is_noisy", property(lambda self: fake.noisy))
    return fake
