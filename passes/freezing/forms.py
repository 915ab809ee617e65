"""Forms of the whole: what was chosen layer by layer must be the fastest as a whole, or another form is returned.

1. The other forms are the library alone, and, of a regrouped model, its layers with their dense weights, which is what
   would be chosen for the dense network, but for filters that nobody reads.
2. Where the whole says otherwise than the sum of its parts, it is measured again, longer.
3. On a busy machine the parts decide: a short call has its chance of not being disturbed, a long one has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from passes.freezing.assemble import Part, assembled
from passes.freezing.decisions import Decisions, LayerDecision
from passes.freezing.stopwatch import Stopwatch, fastest

Layers = Mapping[str, LayerDecision]
NOTES = {
    "library alone": "the library alone is faster than what was chosen layer by layer: its form is returned",
    "dense": "regrouping is not faster here: each layer is run with its dense weight",
    "chosen": "",
}


class Form(NamedTuple):
    """An inference form.

    Attributes:
        model: what is run.
        layers: how each layer is run.
        milliseconds: what each form of the whole took; empty if these were not measured.
        note: what is worth knowing about the choice, or "".
    """

    model: nn.Module
    layers: Layers
    milliseconds: Mapping[str, float]
    note: str


def fastest_form(
    small: nn.Module,
    parts: Sequence[Part],
    inputs: tuple[object, ...],
    stopwatch: Stopwatch,
    step: Callable[[], object] = lambda: None,
) -> Form:
    """Choose how each layer is run, and return the fastest form of the whole.

    Args:
        small: the model without filters that nobody reads.
        parts: its fused parts.
        inputs: example inputs.
        stopwatch: measures.
        step: called after each layer.
    """
    twins = [[part.twin() for part in parts] for _ in range(2)]
    chosen, layers = assembled(small, parts, None, {}, stopwatch, step)
    ways: dict[str, Layers] = {
        "library alone": {path: replace(layer, way="library", tiling=()) for path, layer in layers.items()}
    }
    models = {"library alone": assembled(small, twins.pop(), "library", {}, stopwatch)[0]}
    ungrouped = {path: layer.without_groups() for path, layer in layers.items()}
    if ungrouped != layers:
        ways["dense"], models["dense"] = ungrouped, assembled(small, twins.pop(), None, ungrouped, stopwatch)[0]
    ways["chosen"], models["chosen"] = layers, chosen
    summed = {name: sum(layer.ms or 0.0 for layer in each.values()) for name, each in ways.items()}
    calls = {name: partial(model, *inputs) for name, model in models.items()}
    with torch.no_grad():
        times = stopwatch.race(calls)
        if fastest(times) != fastest(summed):
            again = stopwatch.race(calls, patience=4)
            times = {name: min(ms, again[name]) for name, ms in times.items()}
    best = fastest(summed if stopwatch.is_noisy else times)
    return Form(models[best], ways[best], {name: times[name] for name in reversed(times)}, NOTES[best])


def form_as_told(
    small: nn.Module,
    parts: Sequence[Part],
    strategy: str | None,
    given: Decisions | None,
    stopwatch: Stopwatch,
    step: Callable[[], object] = lambda: None,
) -> Form:
    """The form of a strategy or of decisions, with the times and the note of these if all of them hold."""
    model, layers = assembled(small, parts, strategy, given.layers if given is not None else {}, stopwatch, step)
    if given is not None and layers == given.layers:
        return Form(model, layers, given.milliseconds, given.note)
    return Form(model, layers, {}, "")
