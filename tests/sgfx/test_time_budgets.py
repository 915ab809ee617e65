"""Budgets of milliseconds, on a machine whose layers take as long as they have weights left."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgfx
from passes.calibration.budget.allocation import KNOTS, allocate, proportional
from passes.calibration.budget.error_curves import GRID
from passes.freezing.choosing.decisions import decisions_of
from passes.freezing.choosing.recipe import LibraryLayer
from passes.freezing.time_budget import LEVELS
from passes.freezing.timing import timing_of
from tests.passes.calibration.test_calibrating_regions import Residual, images, made

DENSE = made(Residual())
X = images(1)


@dataclass
class Machine:
    """Says how long a layer takes, and a frozen model.

    Attributes:
        flat: whether layers of one pixel take as long whatever is pruned.
        later: by how much the whole is slower once the even models have been measured.
        wholes: what the whole took, call by call.
    """

    stopwatch: object
    flat: bool = False
    later: float = 1.0

    def __post_init__(self) -> None:
        self.wholes: list[float] = []
        self.stopwatch.race = self.race

    def race(self, ways, patience):
        if "frozen" in ways:
            slower = self.later if len(self.wholes) >= len(LEVELS) else 1.0
            self.wholes.append(slower * self.whole(ways["frozen"].func))
            return {"frozen": self.wholes[-1]}
        if "library alone" in ways:
            return dict.fromkeys(ways, 1.0)
        return dict.fromkeys(ways, self.layer(ways["library"].func))

    def layer(self, layer) -> float:
        if not isinstance(layer, LibraryLayer):
            return 1.0
        flat = self.flat and layer.weight[0, 0].numel() == 1
        return 0.01 * (layer.weight.numel() if flat else int(layer.weight.count_nonzero()))

    def whole(self, frozen) -> float:
        """More than its layers one by one, and something else."""
        return 3.0 + 1.3 * sum(self.layer(each) for each in frozen.modules() if isinstance(each, LibraryLayer))


@pytest.fixture
def machine(stopwatch):
    return Machine(stopwatch)


def span(machine) -> tuple[float, float]:
    """What the whole takes with nothing pruned, and with all that can be."""
    both = (sgfx.freeze(sgfx.compile(DENSE, groups=4, ratio=ratio), X) for ratio in (0.0, 0.96))
    dense, least = map(machine.whole, both)
    return dense, least


def compiled(ms, model=DENSE, **options):
    given = {"groups": 4, "calibration": images(16), "example_inputs": X}
    return sgfx.compile(model, budget={"ms": ms}, **given | options)


def test_the_frozen_model_takes_what_was_asked_for(machine, stopwatch):
    dense, least = span(machine)
    asked = 0.4 * dense + 0.6 * least
    small = compiled(asked)
    timing = timing_of(small)
    assert timing.asked == asked
    assert timing.predicted == pytest.approx(asked, rel=0.05)
    assert timing.measured == machine.wholes[-1] == pytest.approx(asked, rel=0.03)
    report = sgfx.report(DENSE, small, X)
    assert report.timing == timing
    assert f"{asked:.2f} ms asked, {timing.predicted:.2f} predicted, {timing.measured:.2f} measured" in str(report)
    assert report.to_dict()["timing"]["measured"] == timing.measured
    stopwatch.races.clear()
    stopwatch.race = None  # the decisions it was met with are there: nothing is measured any more
    assert machine.whole(sgfx.freeze(small, X)) == timing.measured
    assert timing_of(copy.deepcopy(small)) == timing


def test_ratios_go_where_they_save_time(machine):
    """Where layers of one pixel take as long as ever, the others must be pruned."""
    everywhere = compiled_ratios(compiled(sum(span(machine)) / 2))
    machine.flat = True
    found = compiled_ratios(compiled(sum(span(machine)) / 2))
    assert found["conv3"] == found["side"] == 0 < min(everywhere["conv3"], everywhere["side"])
    assert min(found["conv1"], found["conv2"]) > 0.4


def compiled_ratios(small) -> dict[str, float]:
    return {path: plan.achieved_ratio for path, plan in sgfx.plans(small).items() if plan.grouped}


@pytest.mark.parametrize("later", [0.9, 1.2])
def test_what_the_whole_is_off_is_made_good(machine, later):
    dense, least = span(machine)
    asked, machine.later = 0.5 * (dense + least), later
    timing = timing_of(compiled(asked))
    first, *_, last = machine.wholes[len(LEVELS) :]
    assert first == pytest.approx(later * asked, rel=0.03)
    assert timing.measured == last == pytest.approx(asked, rel=0.03)
    assert timing.predicted == pytest.approx(asked / later, rel=0.03)


def test_time_to_spare_prunes_nothing(machine):
    dense, _ = span(machine)
    small = compiled(2 * dense)
    assert set(compiled_ratios(small).values()) == {0.0}
    assert timing_of(small).measured == dense
    assert len(machine.wholes) == len(LEVELS) + 1  # there is nothing else to try


def test_what_is_too_little_is_refused_with_the_least(machine):
    _, least = span(machine)
    with pytest.raises(sgfx.InputError, match=rf"{0.9 * least:.3g} ms can't be met .* measured is {least:.3g} "):
        compiled(0.9 * least)


def test_a_whole_that_stays_too_slow_is_refused(machine):
    dense, least = span(machine)
    machine.later = 2 * dense / least
    with pytest.raises(sgfx.InputError, match=r"comes nearest takes .* the least that was measured is"):
        compiled(1.1 * least)


def test_a_busy_machine_is_said_and_nothing_of_it_kept(machine, stopwatch):
    dense, least = span(machine)
    stopwatch.noisy = True
    with pytest.warns(UserWarning, match="the machine was busy"):
        small = compiled(0.5 * (dense + least))
    assert decisions_of(small) is None
    assert "it was busy" in str(sgfx.report(DENSE, small, X))


def test_the_model_itself_gets_the_times_where_that_is_asked_for(machine):
    dense, least = span(machine)
    model = copy.deepcopy(DENSE)
    same = compiled(0.5 * (dense + least), model, inplace=True, ignore="conv3")
    assert same is model
    assert timing_of(model).measured == pytest.approx(timing_of(model).asked, rel=0.03)
    assert decisions_of(model) is not None
    assert decisions_of(DENSE) is timing_of(DENSE) is None
    again = sgfx.compile(model, ratio=0.5)
    assert timing_of(again) is None  # a time of before says nothing of it


def test_a_model_that_can_not_be_frozen_is_refused(machine):
    model = copy.deepcopy(DENSE)
    model.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(sgfx.InputError, match=r"budget\['ms'\] is a time of the frozen model.*hook"):
        compiled(10.0, model)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"example_inputs": None}, ValueError, "give the call's example_inputs too"),
        ({"calibration": None}, ValueError, "give calibration too"),
        ({"eliminate": True}, ValueError, "eliminate can't be combined with a budget of milliseconds"),
        ({"step": 0.1}, ValueError, "step prunes to a ratio: it can't be combined with budget"),
        ({"ms": 0}, ValueError, r"budget\['ms'\] must be above 0 and finite, not 0"),
        ({"ms": -1.5}, ValueError, r"budget\['ms'\] must be above 0 and finite, not -1.5"),
        ({"ms": float("inf")}, ValueError, r"budget\['ms'\] must be above 0 and finite, not inf"),
        ({"ms": "10"}, TypeError, r"budget\['ms'\] must be a number"),
        ({"overrides": {"*": {"ratio": 0.5}}}, ValueError, "no layer has a free one"),
    ],
    ids=str,
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        compiled(**{"ms": 10.0} | options)


def test_a_layer_that_saves_no_time_keeps_all():
    """By hand: 3 − 2 = 1 for the other one, which is at ``1 − r``, straight."""
    curve = np.array(GRID)
    assert allocate([0.1 * curve, curve], [np.full(len(KNOTS), 2.0), proportional(2.0)], 3.0) == [0.0, 0.5]


def test_a_layer_goes_to_the_ratio_at_which_time_falls():
    """It costs 1 up to 0.5 and nothing from 0.6 on; what it saves is worth the error of 0.6."""
    falling = np.interp(KNOTS, [0.5, 0.6], [1.0, 0.0])
    error = np.array(GRID)
    assert allocate([error, 10 * error], [falling, proportional(1.0)], 1.0) == [0.6, 0.0]


@given(st.lists(st.lists(st.floats(0, 1), min_size=len(KNOTS), max_size=len(KNOTS)), min_size=1), st.floats(0, 1))
def test_what_is_allotted_keeps_the_limit(steps, share):
    costs = [np.array(each)[::-1].cumsum()[::-1] for each in steps]
    least, most = (sum(np.interp(ratio, KNOTS, each) for each in costs) for ratio in (GRID[-1], 0.0))
    limit = least + share * (most - least)
    ratios = allocate([np.array(GRID) ** 2] * len(costs), costs, limit)
    spent = sum(np.interp(ratio, KNOTS, each) for ratio, each in zip(ratios, costs, strict=True))
    assert spent == pytest.approx(limit, rel=1e-4, abs=1e-4)
