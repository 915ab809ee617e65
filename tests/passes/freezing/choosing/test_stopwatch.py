"""The stopwatch, on a clock that tests turn; what is decided by it; and, once, on the real one."""

import itertools
import random
import time
from types import SimpleNamespace

import pytest

from passes.freezing.choosing import stopwatch as module
from passes.freezing.choosing.stopwatch import LEAST_ROUNDS, MARGIN, MOST_ROUNDS, Stopwatch, fastest


class Machine:
    """A clock that work moves on; a share of the calls is disturbed, and takes up to ten times as long."""

    def __init__(self, monkeypatch, disturbed=0.0):
        self.now = self.waited = 0.0
        self.calls = []
        self._disturbed, self._random = disturbed, random.Random(0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "_seconds_waited", lambda: self.waited)
        monkeypatch.setattr(module.torch, "mm", lambda *_: self.work("mm", 3e-4)())

    def work(self, name, seconds):
        def run():
            self.calls.append(name)
            more = seconds * self._random.uniform(1, 9) if self._random.random() < self._disturbed else 0.0
            self.now += seconds + more
            self.waited += more

        return run


pytestmark = pytest.mark.usefixtures("real_stopwatch")


def test_a_quiet_machine_takes_few_rounds(monkeypatch):
    machine, watch = Machine(monkeypatch), Stopwatch()
    times = watch.race({"a": machine.work("a", 0.002), "b": machine.work("b", 0.001)})
    assert times == pytest.approx({"a": 2, "b": 1})
    assert machine.calls.count("a") == machine.calls.count("b") == 1 + LEAST_ROUNDS  # one to warm up
    assert [watch.spread, watch.waiting] == pytest.approx([1, 0])
    assert not watch.is_noisy
    assert watch.complaint() == ""


@pytest.mark.parametrize("disturbed", [0.3, 0.5, 0.7])
def test_a_busy_machine_finds_the_same(monkeypatch, disturbed):
    machine, watch = Machine(monkeypatch, disturbed), Stopwatch()
    for _ in range(10):
        ways = {name: machine.work(name, seconds) for name, seconds in (("a", 0.0012), ("b", 0.001), ("c", 0.002))}
        assert watch.race(ways) == pytest.approx({"a": 1.2, "b": 1, "c": 2})
    assert watch.is_noisy
    assert "the machine was busy: threads waited for a core for" in watch.complaint()


def test_equal_times_are_not_trusted_while_threads_wait(monkeypatch):
    machine, watch = Machine(monkeypatch), Stopwatch()
    late = itertools.count()

    def way():  # always disturbed alike, but for one call
        machine.calls.append("a")
        machine.now += 0.001 if next(late) == 12 else 0.004
        machine.waited += 0.003

    assert watch.race({"a": way}) == pytest.approx({"a": 1.0})
    assert watch.is_noisy


def test_it_ends_where_times_never_settle(monkeypatch):
    machine, watch = Machine(monkeypatch), Stopwatch()
    for size in (1e-6, 1e-3, 10.0):  # of which many, some, and the least number of calls fit the time
        calls = itertools.count(1)

        def way(calls=calls, size=size):
            machine.calls.append("a")
            machine.now += size * (1 + next(calls))

        machine.calls.clear()
        watch.race({"a": way})
        rounds = machine.calls.count("a") - 1
        assert rounds == {1e-6: MOST_ROUNDS, 10.0: LEAST_ROUNDS}.get(size, rounds)
        assert LEAST_ROUNDS <= rounds <= MOST_ROUNDS


def test_more_patience_means_more_rounds(monkeypatch):
    machine = Machine(monkeypatch, 0.7)
    counts = []
    for patience in (1, 4):
        machine.calls.clear()
        Stopwatch().race({"a": machine.work("a", 0.002)}, patience)
        counts.append(machine.calls.count("a"))
    assert counts[0] < counts[1]


def test_noise_is_what_spreads_or_waits(monkeypatch):
    machine, watch = Machine(monkeypatch, 0.6), Stopwatch()
    for _ in range(5):
        watch.race({"a": machine.work("a", 1e-3)})
    assert watch.spread > 4
    assert 0.5 < watch.waiting < 1
    monkeypatch.setattr(module, "_seconds_waited", lambda: 0.0)  # where the system does not say it
    watch = Stopwatch()
    for _ in range(5):
        watch.race({"a": machine.work("a", 1e-3)})
    assert watch.waiting == 0
    assert watch.is_noisy


def test_of_equals_the_simpler_one_wins():
    assert fastest({"library": 1.04, "channels_last": 1.0, "kernel 28 4": 1.02}) == "library"
    assert fastest({"library": MARGIN + 0.01, "channels_last": 1.03, "kernel 28 4": 1.0}) == "channels_last"
    assert fastest({"library": 2.0, "kernel 28 4": 1.03, "kernel 14 4": 1.0}) == "kernel 28 4"


def test_waiting_is_read_from_the_system(tmp_path, monkeypatch):
    for thread, text in enumerate(["5 1500000000 7\n", "1 500000000 2\n", "", "1\n"]):
        (tmp_path / str(thread)).mkdir()
        (tmp_path / str(thread) / "schedstat").write_text(text)
    monkeypatch.setattr(module, "THREADS", tmp_path)
    assert module._seconds_waited() == 2.0
    monkeypatch.setattr(module, "THREADS", tmp_path / "none")
    assert module._seconds_waited() == 0.0


def test_on_the_real_clock():
    times = Stopwatch().race({"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.001)})
    assert times["long"] >= 20
    assert 1 <= times["short"] < 20
    assert fastest(times) == "short"
