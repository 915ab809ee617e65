"""How fast frozen models are, against every way to run the dense network and against channel pruning at equal MACs.

``python -m benchmarks.latency [--models resnet50 …] [--batches 1 16] [--quick] [--json benchmarks/results/latency.json]
[--chart docs/latency.png]``, then ``python -m benchmarks.latency_report`` for the page.

Two threads. Every network and batch size has a process of its own, in which all forms are called in turn, round by
round; a ratio is the median of the ratios within the rounds, given with its quartiles. What a peer can't do is written
down with its message. Freezing is timed, and memory measured, in fresh processes as well. What must be reached stands
in `latency_report`. The file of results is added to, case by case, if it comes from the same machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency_forms import NETWORKS, THREADS, freezing_seconds, peak_memory, time_forms
from benchmarks.latency_report import print_case, print_required, write_chart
from benchmarks.machine import describe_machine

RESULTS = Path("benchmarks/results/latency.json")
MEMORY_AND_FREEZING = "resnet50"


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to be quoted")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results (default: %(default)s)")
    parser.add_argument("--chart", type=Path, help="bar chart, a PNG")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    results = read_results(options.json)
    print(results["machine"])
    rounds, seconds = (5, 20.0) if options.quick else (40, 60.0)
    for name in options.models:
        for batch in options.batches:
            key = f"{name}/{batch}"
            print(f"\n{key}", flush=True)
            results["cases"][key] = in_fresh_process(time_forms, name, batch, rounds, seconds)
            print_case(results["cases"][key])
            write_results(options.json, results)
    if MEMORY_AND_FREEZING in options.models:
        results["freezing"] = measure_freezing(MEMORY_AND_FREEZING, repeats=1 if options.quick else 3)
        results["memory"] = measure_memory(MEMORY_AND_FREEZING, results["freezing"].get("decisions"))
        write_results(options.json, results)
    print()
    print_required(results)
    if options.chart:
        write_chart(results, options.chart)


def read_results(file: Path) -> dict[str, Any]:
    """Results to add to, if they were measured on this machine, else none."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    machine = describe_machine()
    return found if found.get("machine") == machine else {"machine": machine, "cases": {}, "freezing": {}, "memory": {}}


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Write what is known so far."""
    results["date"] = time.strftime("%Y-%m-%d")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def in_fresh_process(measure: Callable[..., Any], *arguments: object, cache: str | None = None) -> dict[str, Any]:
    """What `measure` returns in a process of its own, or ``{"error": …}``.

    Args:
        measure: one of the functions of `latency_forms`.
        arguments: its arguments.
        cache: where the kernel's compiled code is kept, or None for the usual place.
    """
    before = os.environ.get("NUMBA_CACHE_DIR")
    if cache is not None:
        os.environ["NUMBA_CACHE_DIR"] = cache  # the new process inherits it
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, *arguments).result()
        return found if isinstance(found, dict) else {"value": found}
    except Exception as error:  # the process may have died: a result too
        print(f"  failed: {error!r}", flush=True)
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if before is None:
            os.environ.pop("NUMBA_CACHE_DIR", None)
        else:
            os.environ["NUMBA_CACHE_DIR"] = before


def measure_freezing(name: str, repeats: int) -> dict[str, Any]:
    """Seconds to freeze a network at batch 1: the first time ever, with the code cached, with decisions given."""
    seconds: dict[str, list[float]] = {"first": [], "cached": [], "decided": []}
    decisions = None
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as empty:
            for kind in seconds:
                found = in_fresh_process(
                    freezing_seconds, name, 1, decisions if kind == "decided" else None, cache=empty
                )
                if "error" in found:
                    return {"seconds": seconds, **found}
                taken, decisions = found["value"]
                seconds[kind].append(taken)
                print(f"freezing {name}, {kind}: {taken:.1f} s", flush=True)
    return {"seconds": seconds, "decisions": decisions}


def measure_memory(name: str, decisions: dict[str, Any] | None) -> dict[str, Any]:
    """Peak bytes of ten calls at batch 1, each form in a process of its own; five times, interleaved."""
    peaks: dict[str, list[int]] = {"dense": [], "frozen": []}
    for _ in range(5):
        for form in peaks:
            found = in_fresh_process(peak_memory, name, 1, form, decisions)
            if "error" in found:
                return {"bytes": peaks, **found}
            peaks[form].append(found["value"])
    for form, each in peaks.items():
        print(f"peak memory of ten calls, {form}: {', '.join(f'{peak / 2**20:.1f}' for peak in each)} MiB")
    return {"bytes": peaks}


if __name__ == "__main__":
    main()
