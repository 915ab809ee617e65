"""What the coverage sweep does with one network, in a process of its own."""

from __future__ import annotations

import dataclasses
import resource
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import sgfx
from benchmarks.coverage_cases import Case, case, family_of
from passes.layers.channel_cut import cuts
from tests.tools.oracle import Differences, compare, mask, run

LARGE = 150_000_000  # parameters above which one variant is compared at a time, with a sample of the gradients
SAMPLE = 24


def examine_safely(name: str, memory: float, sender: Connection) -> None:
    """Examine a network under a memory limit and send its record, of which whatever goes wrong is a part."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    record: dict[str, Any] = {"name": name, "family": family_of(name)}
    quantized = record["family"] == "quantized"
    try:
        record |= examine(case(name))
        if quantized:
            record |= {"status": "failed", "reason": "a quantized network was compiled instead of refused"}
    except sgfx.InputError as error:
        record |= {"status": "refused as it must be" if quantized else "refused", "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        record |= {"status": "failed", "reason": reason, "trace": traceback.format_exc()[-3000:]}
    record["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    sender.send(record)


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
