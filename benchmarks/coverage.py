"""Every network of torchvision, and the convolutional families of timm, compiled and compared with the masked one.

``python -m benchmarks.coverage [--models PATTERN] [--timm] [--json] [--write docs/coverage.md]``. Random weights,
groups=8, ratio=0.5. In eval and in train mode (dropout and stochastic depth off) the outputs, and in train mode the
gradients and running statistics, with and without elimination, must equal those of the dense network with the pruned
weights set to zero (`benchmarks.oracle`): to 1e-8 in double precision, to 1e-4 where the network itself only runs in
single. Of detectors the losses and the outputs of the heads are compared. Quantized networks must be refused.

Each network runs in a process of its own, with a memory limit and a time limit. Results are kept, one file a network,
so that a sweep that was stopped goes on where it was; ``--again`` starts anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import resource
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sgfx
from benchmarks.coverage_cases import Case, case, family_of, names
from benchmarks.coverage_table import summary, table
from benchmarks.machine import describe_machine
from benchmarks.oracle import Differences, compare, mask, run
from passes.cut import cuts

LARGE = 150_000_000  # parameters above which one variant is compared at a time, with a sample of the gradients
SAMPLE = 24


def main() -> None:
    """Run the sweep, print a line for each network, and exit with 1 if any of them failed."""
    options = parser().parse_args()
    if options.one:
        print(json.dumps(examine_safely(options.one, options.memory)))
        return
    every = names(timm=options.timm)
    chosen = [name for name in every if any(fnmatch.fnmatch(name, pattern) for pattern in options.models)]
    options.results.mkdir(parents=True, exist_ok=True)
    records = []
    if not options.json:
        print(describe_machine(), flush=True)
    for name in chosen:
        file = options.results / f"{name.replace('/', '-')}.json"
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
        options.write.write_text(table(records))
    sys.exit(any(record["status"] not in ("exact", "refused as it must be") for record in records))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["*"], metavar="PATTERN", help="names or patterns (default: all)"
    )
    parser.add_argument("--timm", action="store_true", help="timm's convolutional families instead of torchvision's")
    parser.add_argument("--json", action="store_true", help="print the records instead of lines")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table in Markdown")
    parser.add_argument("--results", type=Path, default=Path("build/coverage"), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="examine networks anew that have a result")
    parser.add_argument("--memory", type=float, default=12, metavar="GIB", help="limit of a process (default: 12)")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="limit of a process (default: 1800)")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def in_own_process(name: str, memory: float, timeout: float) -> dict[str, Any]:
    """Examine a network in a fresh process and return its record."""
    command = [sys.executable, "-m", "benchmarks.coverage", "--one", name, "--memory", str(memory)]
    start = time.perf_counter()
    failed = {"name": name, "family": family_of(name), "status": "failed"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return failed | {"reason": f"not done after {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return failed | {"reason": f"the process ended with {done.returncode}", "trace": done.stderr[-2000:]}
    record: dict[str, Any] = json.loads(lines[-1])
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def examine_safely(name: str, memory: float) -> dict[str, Any]:
    """Examine a network under a memory limit; whatever goes wrong becomes part of its record."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    record: dict[str, Any] = {"name": name, "family": family_of(name)}
    quantized = record["family"] == "quantized"
    try:
        record |= examine(case(name))
        if quantized:
            return record | {"status": "failed", "reason": "a quantized network was compiled instead of refused"}
    except sgfx.InputError as error:
        return record | {"status": "refused as it must be" if quantized else "refused", "reason": str(error)}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return record | {"status": "failed", "reason": message, "trace": traceback.format_exc()[-3000:]}
    record["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return record


def examine(case: Case, groups: int = 8, ratio: float = 0.5) -> dict[str, Any]:
    """Compile a network with and without elimination, compare, and return the figures."""
    parameters = sum(parameter.numel() for parameter in case.build().parameters())
    batches = [(False,), (True,)] if parameters > LARGE else [(False, True)]
    figures: dict[str, Any] = {"parameters": parameters, "dtype": str(case.dtype).removeprefix("torch.")}
    figures["input"] = [list(x.shape) for x in case.evaluation if isinstance(x, torch.Tensor)] or "images"
    differences: dict[str, dict[str, Any]] = {}
    for batch in batches:
        dense = case.build()
        sample = sampled(dense) if parameters > LARGE else None
        smalls = {
            eliminate: sgfx.compile(
                dense, groups=groups, ratio=ratio, example_inputs=case.training, eliminate=eliminate
            )
            for eliminate in batch
        }
        for eliminate, small in smalls.items():
            figures |= structure(small, parameters, eliminate)
        if len(batch) > 1:
            assert sgfx.plans(smalls[False]) == sgfx.plans(smalls[True]), "elimination changed the plans"
        masked = mask(dense, smalls[batch[0]])
        for training in (False, True):
            expected = one_run(case, masked, training, sample)
            for eliminate, small in smalls.items():
                actual = one_run(case, small, training, sample)
                found = compare(expected, actual, small, cuts(small))
                key = ("train" if training else "eval") + (", eliminated" if eliminate else "")
                differences[key] = dataclasses.asdict(found)
                if training:
                    figures["reached"] = reached(expected.gradients)
    figures["differences"] = differences
    worst = max(Differences(**each).largest for each in differences.values())
    return figures | {"worst": worst, "status": "exact" if worst <= case.tolerance else "wrong"}


def one_run(case: Case, model: nn.Module, training: bool, sample: list[str] | None) -> Any:
    """Run one variant in one mode."""
    inputs = case.training if training else case.evaluation
    return run(model, inputs, training=training, taps=case.taps, sample=sample)


def sampled(model: nn.Module) -> list[str]:
    """Names of some parameters, evenly over the network, both ends included."""
    every = [name for name, parameter in model.named_parameters() if parameter.numel() < 20_000_000]
    return [every[i * (len(every) - 1) // (SAMPLE - 1)] for i in range(SAMPLE)]


def structure(small: nn.Module, parameters: int, eliminate: bool) -> dict[str, Any]:
    """What was regrouped, what was left alone and why, and what elimination saved beyond."""
    plans = sgfx.plans(small)
    left = sum(parameter.numel() for parameter in small.parameters())
    if eliminate:
        return {"parameters_eliminated": left, "modules_cut": len(cuts(small))}
    grouped = [plan for plan in plans.values() if plan.grouped]
    weights = sum(plan.weights for plan in grouped)
    return {
        "layers": len(plans),
        "regrouped": len(grouped),
        "achieved": sum(plan.achieved_ratio * plan.weights for plan in grouped) / max(weights, 1),
        "weights_regrouped": weights / parameters,
        "parameters_small": left,
        "reasons": Counter(plan.reason for plan in plans.values() if plan.reason).most_common(8),
    }


def reached(gradients: dict[str, torch.Tensor]) -> float:
    """Share of the parameters that have a gradient other than zero: how much of the network the comparison sees."""
    return sum(bool(gradient.any()) for gradient in gradients.values()) / max(len(gradients), 1)


if __name__ == "__main__":
    main()
