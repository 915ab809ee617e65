"""Forms of the whole: what was chosen layer by layer must be the fastest as a whole, or another form is returned.

1. The other forms are the library alone; of a regrouped model, its layers with their dense weights, which is what would
   be chosen for the dense network, but for filters that nobody reads; and the layers in the kernel's programs wherever
   the library saves less than leaving the program for it costs, which no layer's own time shows.
2. Where the whole says otherwise than the sum of its parts, it is measured again, longer.
3. On a busy machine the parts decide: a short call has its chance of not being disturbed, a long one has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from passes.freezing.asking import ASKED, Asked
from passes.freezing.assembling import assembled
from passes.freezing.choosing.choosing import Choosing, layer_works
from passes.freezing.choosing.decisions import Decisions, LayerDecision
from passes.freezing.choosing.recipe import Recipe
from passes.freezing.choosing.stopwatch import Stopwatch, fastest
from passes.freezing.parts import PARTS, Part
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.progress import Progress, silent
from passes.options.settings import SETTINGS

Layers = Mapping[str, LayerDecision]
NOTES = {
    "library alone": "the library alone is faster than what was chosen layer by layer: its form is returned",
    "dense": "regrouping is not faster here: each layer is run with its dense weight",
    "chosen": "",
    "in programs": "",
}


@dataclass(frozen=True)
class Form:
    """An inference form.

    Attributes:
        model: what is run.
        layers: how each layer is run.
        milliseconds: what each form of the whole took; empty if these were not measured.
        note: what is worth knowing about the choice, or "".
        is_lasting: whether it was measured now, and is to be relied on.
    """

    model: nn.Module
    layers: Layers
    milliseconds: Mapping[str, float]
    note: str
    is_lasting: bool


FORM = Fact[Form]("form")


class Forming(Pass):
    """Choose how each layer is run, and with it the form of the whole: by measuring, or as it was asked for.

    Args:
        arranging: the passes that arrange memory and calls around the layers that were chosen.
        progress: shows how far it is.
    """

    name = "forming"
    requires = (SETTINGS, ASKED, PARTS)
    ensures = (FORM,)
    ends = (PARTS,)

    def __init__(self, arranging: Sequence[Pass], progress: Progress = silent) -> None:
        """Take both."""
        self._arranging, self._progress = arranging, progress

    def run(self, compilation: Compilation) -> Facts:
        """Measure, or do as told."""
        parts, asked = compilation[PARTS], compilation[ASKED]
        works = [layer_works(part.graph) for part in parts]
        given = asked.fitting({path: work for each in works for path, work in each.items()})
        with self._progress("freeze", sum(map(len, works)), "layer") as tick:
            if given is None and asked.strategy is None:
                inputs = compilation[SETTINGS].example_inputs or ()
                return {FORM: self._fastest(compilation.model, parts, inputs, tick)}
            return {FORM: self._as_told(compilation.model, parts, asked, given, tick)}

    def check(self, compilation: Compilation) -> str | None:
        """No recipe is left in the whole."""
        modules = compilation[FORM].model.modules()
        return next((f"layer {each.path!r} can't be run" for each in modules if isinstance(each, Recipe)), None)

    def _as_told(
        self,
        small: nn.Module,
        parts: Sequence[Part],
        asked: Asked,
        given: Decisions | None,
        tick: Callable[[], object],
    ) -> Form:
        """The form of a strategy or of decisions, with the times and the note of these if all of them hold."""
        stopwatch = Stopwatch()
        choosing = Choosing(asked.strategy, given.layers if given is not None else {}, stopwatch, tick)
        model, layers = assembled(small, parts, (choosing, *self._arranging))
        asked.check_names(layers)
        if given is not None and layers == given.layers:
            return Form(model, layers, given.milliseconds, _joined(given.note, stopwatch.complaint()), False)
        return Form(model, layers, {}, stopwatch.complaint(), False)

    def _fastest(
        self, small: nn.Module, parts: Sequence[Part], inputs: tuple[object, ...], tick: Callable[[], object]
    ) -> Form:
        """The fastest form of the whole, of all that there are."""
        stopwatch = Stopwatch()
        twins = [[part.twin() for part in parts] for _ in range(3)]
        chosen, layers = assembled(small, parts, (Choosing(None, {}, stopwatch, tick), *self._arranging))
        library = {path: replace(layer, way="library", tiling=()) for path, layer in layers.items()}
        alone, _ = assembled(small, twins.pop(), (Choosing("library", {}, stopwatch), *self._arranging))
        forms: dict[str, tuple[nn.Module, Layers]] = {"library alone": (alone, library)}
        ungrouped = {path: layer.without_groups() for path, layer in layers.items()}
        if ungrouped != layers:
            dense, _ = assembled(small, twins.pop(), (Choosing(None, ungrouped, stopwatch), *self._arranging))
            forms["dense"] = (dense, ungrouped)
        forms["chosen"] = (chosen, layers)
        together = {path: layer.within_program() for path, layer in layers.items()}
        if together != layers:
            longer, _ = assembled(small, twins.pop(), (Choosing(None, together, stopwatch), *self._arranging))
            forms["in programs"] = (longer, together)
        best, times = _raced(forms, inputs, stopwatch)
        model, decided = forms[best]
        in_order = {name: times[name] for name in reversed(times)}
        return Form(model, decided, in_order, _joined(NOTES[best], stopwatch.complaint()), not stopwatch.is_noisy)


def _raced(
    forms: Mapping[str, tuple[nn.Module, Layers]], inputs: tuple[object, ...], stopwatch: Stopwatch
) -> tuple[str, dict[str, float]]:
    """The fastest of the forms, named in order of simplicity, and the milliseconds of all of them."""
    summed = {name: sum(layer.ms or 0.0 for layer in layers.values()) for name, (_, layers) in forms.items()}
    calls = {name: partial(model, *inputs) for name, (model, _) in forms.items()}
    with torch.no_grad():
        times = stopwatch.race(calls)
        if fastest(times) != fastest(summed):
            again = stopwatch.race(calls, patience=4)
            times = {name: min(ms, again[name]) for name, ms in times.items()}
    return fastest(summed if stopwatch.is_noisy else times), times


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
