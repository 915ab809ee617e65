"""Freezing beside busy processes: is what it decides there as fast as what it decides on a quiet machine?

``python -m benchmarks.busy_machine``, on a machine that is quiet but for this. A compiled network is frozen in quiet,
beside one and beside two processes that keep a core busy each; then all forms are timed in turn on the quiet machine.
Must reach: at most 1.15 of the form that was frozen in quiet.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import sgfx
from benchmarks.latency_forms import NETWORKS, Case, Run, make_case, second_call
from benchmarks.machine import describe_machine
from passes.freezing.choosing.decisions import Decisions, attach_decisions

MOST = 1.15
PROCESSES = (0, 1, 2)


def main() -> None:
    """Print, for each number of busy processes, what freezing decided, how long it took, and how fast the result is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--freezings", type=int, default=3, help="for each number of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of timing all forms (default: %(default)s)")
    options = parser.parse_args()
    case = make_case(options.network, batch=1)
    print(describe_machine())
    freeze(case)  # compiles the kernel
    runs: dict[str, Run] = {}
    for number in range(options.freezings):
        for processes in PROCESSES:
            name = f"{processes} busy processes, freezing {number + 1}"
            with busy(processes):
                start = time.perf_counter()
                frozen = freeze(case)
                seconds = time.perf_counter() - start
            made: Decisions = frozen.decisions
            ways = ", ".join(f"{count} {way}" for way, count in Counter(x.way for x in made.layers.values()).items())
            print(f"{name}: {seconds:.1f} s; {ways}; {made.note or 'no note'}", flush=True)
            runs[name] = partial(frozen, case.images)
    report(timed(runs, options.rounds))


def freeze(case: Case) -> Any:
    """Freeze a compiled network, whatever was decided before."""
    small = copy.deepcopy(case.small)
    attach_decisions(small, None)
    return sgfx.freeze(small, case.images, progress=False)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many cores busy while this lasts."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    time.sleep(0.5 if started else 0)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(second_call(run))
    return times


def report(times: dict[str, list[float]]) -> None:
    """Print the median of each form, and its ratio to the form of its freezing that was made in quiet."""
    worst = 0.0
    for name, each in times.items():
        quiet = times[f"0 busy processes, freezing {name.rpartition(' ')[2]}"]
        low, middle, high = statistics.quantiles([a / b for a, b in zip(each, quiet, strict=True)], n=4)
        worst = max(worst, middle)
        quartiles = f"quartiles {low:.2f} to {high:.2f}"
        print(f"{name}: {1000 * statistics.median(each):.2f} ms, {middle:.2f} of quiet ({quartiles})")
    verdict = "reached" if worst <= MOST else "MISSED"
    print(f"at most {worst:.2f} of the form frozen in quiet; must be at most {MOST}: {verdict}")


if __name__ == "__main__":
    main()
