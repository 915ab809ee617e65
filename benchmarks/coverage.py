"""Every network of torchvision, and the convolutional families of timm, compiled and compared with the masked one.

``python -m benchmarks.coverage [--models PATTERN] [--timm] [--json] [--write docs/coverage.md]``. Random weights,
groups=8, ratio=0.5. In eval and in train mode (dropout and stochastic depth off) the outputs, and in train mode the
gradients and running statistics, with and without elimination, must equal those of the dense network with the pruned
weights set to zero (`tests.tools.oracle`): to 1e-8 in double precision, to 1e-4 where the network itself only runs in
single. Of detectors the losses and the outputs of the heads are compared. Quantized networks must be refused.

Each network runs in a process of its own, with a memory limit and a time limit. Results are kept, one file a network,
so that a sweep that was stopped goes on where it was; ``--again`` starts anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.coverage_cases import family_of, names
from benchmarks.coverage_examination import examine_safely
from benchmarks.coverage_table import summary, table
from benchmarks.machine import describe_machine


def main() -> None:
    """Run the sweep, print a line for each network, and exit with 1 if any of them failed."""
    options = parser().parse_args()
    every = names(timm=options.timm)
    chosen = dict.fromkeys(name for pattern in options.models for name in fnmatch.filter(every, pattern))
    options.results.mkdir(parents=True, exist_ok=True)
    records = []
    if not options.json:
        print(describe_machine(), flush=True)
    for name in chosen:
        file = file_of(options.results, name)
        if options.again or not file.exists():
            file.write_text(json.dumps(in_own_process(name, options.memory, options.timeout), indent=1))
        records.append(json.loads(file.read_text()))
        if not options.json:
            print(summary(records[-1]), flush=True)
    if options.json:
        print(json.dumps(records, indent=1))
    else:
        counts = Counter(record["status"] for record in records)
        print(f"{len(records)} networks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if options.write:
        every = names(timm=False) + names(timm=True)
        options.write.write_text(table([record_of(options.results, name) for name in every]))
    sys.exit(any(record["status"] not in ("exact", "refused as it must be") for record in records))


def file_of(results: Path, name: str) -> Path:
    """Where the record of a network is kept."""
    return results / f"{name.replace('/', '-')}.json"


def record_of(results: Path, name: str) -> dict[str, Any]:
    """The record of a network that may not have been examined yet."""
    file = file_of(results, name)
    if not file.exists():
        return {"name": name, "family": family_of(name), "status": "not examined", "reason": "no result yet"}
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["*"], metavar="PATTERN", help="names or patterns, in this order (default: all)"
    )
    parser.add_argument("--timm", action="store_true", help="timm's convolutional families instead of torchvision's")
    parser.add_argument("--json", action="store_true", help="print the records instead of lines")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a table of all results so far, in Markdown")
    parser.add_argument("--results", type=Path, default=Path("build/coverage"), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="examine networks anew that have a result")
    parser.add_argument("--memory", type=float, default=12, metavar="GIB", help="limit of a process (default: 12)")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="limit of a process (default: 1800)")
    return parser


def in_own_process(name: str, memory: float, timeout: float) -> dict[str, Any]:
    """Examine a network in a fresh process, forked from one that has only imported, and return its record."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.coverage_examination", "sgfx.compiler"])
    start = time.perf_counter()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine_safely, args=(name, memory, sender))
    process.start()
    sender.close()
    failed = {"name": name, "family": family_of(name), "status": "failed"}
    try:
        done = receiver.poll(timeout)
        record: dict[str, Any] = receiver.recv() if done else failed | {"reason": f"not done after {timeout:.0f} s"}
    except EOFError:
        record = failed | {"reason": "the process was killed"}
    process.kill()
    process.join()
    return record | {"seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    main()
