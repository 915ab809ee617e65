"""Budgets: the allocation against an exhaustive search, what is achieved against `report`, and the refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sgfx
from passes.calibration.budget.allocation import allocate, proportional, settle
from passes.calibration.budget.error_curves import GRID, _halves, error_curve
from passes.calibration.budget.judging import held_out_error
from passes.calibration.budget.spending import best_part
from passes.calibration.data import parted, read_examples
from passes.calibration.layer_solver import Sample
from passes.compression.grouping import Groups
from passes.compression.pruning import truncate
from tests.passes.calibration.test_calibrating_regions import Residual, images, made
from tests.sgfx.test_calibrate import Untraceable, error

DENSE = made(Residual())


def convex(steepness: float) -> np.ndarray:
    return steepness * np.array(GRID) ** 2


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(1, 100)), min_size=2, max_size=3),
    st.floats(0.1, 1),
)
def test_allocation_is_as_good_as_any_on_the_grid(layers, share):
    curves, costs = [convex(steepness) for steepness, _ in layers], [cost for _, cost in layers]
    limit = share * sum(costs)
    ratios = allocate(curves, [proportional(cost) for cost in costs], limit)
    spent = sum(cost * (1 - ratio) for cost, ratio in zip(costs, ratios, strict=True))
    assert limit * (1 - 1e-5) - 1e-5 <= spent <= limit * (1 + 1e-5) + 1e-5
    ours = sum(np.interp(ratio, GRID, curve) for ratio, curve in zip(ratios, curves, strict=True))
    choices = itertools.product(range(len(GRID)), repeat=len(layers))
    best = min(
        sum(curve[i] for curve, i in zip(curves, choice, strict=True))
        for choice in choices
        if sum(cost * (1 - GRID[i]) for cost, i in zip(costs, choice, strict=True)) <= limit
    )
    assert ours <= best + 1e-2 * max(steepness for steepness, _ in layers)


def test_a_limit_below_the_largest_ratios_is_none():
    assert allocate([convex(1.0)], [proportional(100.0)], 1.0) is None


def left(dense: nn.Module, small: nn.Module, measure: str) -> float:
    found = sgfx.report(dense, small, images(1))
    return found.macs / found.macs_dense if measure == "macs" else found.params / found.params_dense


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.6}, {"macs": 1}, {"macs": 0.5}], ids=str)
def test_what_remains_is_the_budget(budget):
    small = sgfx.compile(DENSE, groups=2, budget=budget, calibration=images(16), overrides={"head": {"ratio": 0.2}})
    ((measure, share),) = budget.items()
    assert left(DENSE, small, measure) == pytest.approx(share, abs=0.01)
    assert sgfx.plans(small)["head"].requested_ratio == 0.2


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.3}], ids=str)
def test_what_remains_after_elimination_is_the_budget(budget):
    torch.manual_seed(0)
    widths = ((3, 32), (32, 32), (32, 32), (32, 8))
    dense = nn.Sequential(*(nn.Conv2d(*width, 3, padding=1) for width in widths)).double()
    options = {"groups": 4, "budget": budget, "calibration": images(16)}
    small = sgfx.compile(dense, eliminate=True, **options)
    ((measure, share),) = budget.items()
    assert left(dense, small, measure) == pytest.approx(share, abs=0.01)
    assert left(dense, sgfx.compile(dense, **options), measure) == pytest.approx(share, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.floats(0.1, 1), st.integers(0, 10**6))
def test_settled_ratios_are_met_exactly_and_nearer_to_the_limit(inputs, share, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [
        Groups(torch.tensor([0, 0, 1, 1, 1]), torch.rand(2, count, generator=generator, dtype=torch.float64))
        for count in inputs
    ]
    costs, wished = [100.0 * count for count in inputs], [1 - share] * len(inputs)
    limit = share * sum(costs)

    def spent(ratios: list[float]) -> float:
        kept = [truncate(each.centroids, torch.tensor([2, 3]), r) for each, r in zip(groups, ratios, strict=True)]
        weights = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
        shares = [float((keep * weights).sum() / weights.sum() / keep.shape[1]) for keep in kept]
        return sum(cost * share for cost, share in zip(costs, shares, strict=True))

    ratios = settle(wished, groups, [proportional(cost) for cost in costs], limit)
    assert sum(cost * (1 - r) for cost, r in zip(costs, ratios, strict=True)) == pytest.approx(spent(ratios))
    assert abs(spent(ratios) - limit) <= abs(spent(wished) - limit) + 1e-6


def test_the_curve_is_of_rows_that_were_not_fitted():
    generator = torch.Generator().manual_seed(0)
    small = sgfx.compile(nn.Sequential(nn.Linear(20, 6)).double(), ratio=0.0, overrides={"0": {"groups": 2}})
    layer = small[0].requires_grad_(False)
    groups = Groups(torch.tensor([0, 0, 0, 1, 1, 1]), torch.rand(2, 20, generator=generator, dtype=torch.float64))
    x, y = (torch.randn(rows, generator=generator, dtype=torch.float64) for rows in ((30, 20), (30, 6)))
    sample = Sample(x, y, torch.zeros_like(y), torch.ones(6, dtype=torch.float64), False)
    dual = error_curve(layer, sample, groups)  # 15 rows and 20 inputs: fitted exactly, if all rows were
    assert dual[0] > 0.5
    keep = truncate(groups.centroids, torch.tensor([3, 3]), GRID[5])
    start = layer.dense_weight().detach()
    total, middle_x, middle_y = 0.0, x[:15].mean(0), y[:15].mean(0)
    penalty = 1e-3 * float((x[:15] - middle_x).square().sum(0).mean())
    for filter_, kept in enumerate(keep[groups.labels]):
        below = penalty**0.5 * torch.eye(int(kept.sum()), dtype=torch.float64)
        left = torch.cat([(x[:15] - middle_x)[:, kept], below])
        weight = torch.linalg.lstsq(left, torch.cat([(y[:15] - middle_y)[:, filter_], below @ start[filter_, kept]]))
        off = (x[15:] - middle_x)[:, kept] @ weight.solution - (y[15:] - middle_y)[:, filter_]
        total += float(off.square().sum())
    expected = total / float((y[15:] - y.mean(0)).square().sum())
    assert dual[5] == pytest.approx(max(expected, *dual[:5]), rel=1e-9)
    wide = Sample(x.repeat(2, 1), y.repeat(2, 1), torch.zeros(60, 6).double(), torch.ones(6).double(), False)
    plain = error_curve(layer, wide, groups)  # 30 rows and 20 inputs: the primal
    halves = _halves(wide)
    for index, ratio in enumerate(GRID):
        keep = truncate(groups.centroids, torch.tensor([3, 3]), ratio)
        pairs = [(torch.arange(3) + 3 * group, kept.nonzero().flatten()) for group, kept in enumerate(keep)]
        errors = sum(float(halves.left_of(f, k, start[f][:, k]).sum()) for f, k in pairs)
        assert plain[index] == pytest.approx(max(errors / float(y.sub(y.mean(0)).square().sum()), *plain[:index], 0.0))


def test_ratios_are_large_where_they_hurt_least():
    torch.manual_seed(0)
    widths = ((3, 16), (16, 16), (16, 16), (16, 8))
    dense = nn.Sequential(*(nn.Conv2d(*width, 3, padding=1) for width in widths)).double()
    with torch.no_grad():
        dense[1].weight[:, 4:] *= 1e-3  # twelve of sixteen inputs matter little
    small = sgfx.compile(dense, groups=2, budget={"macs": 0.6}, calibration=images(16))
    ratios = [plan.achieved_ratio for plan in sgfx.plans(small).values() if plan.grouped]
    assert ratios[0] > 0.6 > ratios[1]
    found = sgfx.report(dense, small, images(1))
    assert found.macs / found.macs_dense == pytest.approx(0.6, abs=0.01)
    uniform = sgfx.compile(dense, groups=2, ratio=found.connections_removed.achieved, calibration=images(16))
    assert error(dense, small, images(16)) < 0.5 * error(dense, uniform, images(16))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ratio": 0.5, "budget": {"macs": 0.5}}, ValueError, "exactly one of ratio"),
        ({}, ValueError, "exactly one of ratio"),
        ({"budget": {"macs": 0.5}}, ValueError, "give calibration too"),
        ({"budget": {"macs": 0.5}, "step": 0.1, "calibration": images(2)}, ValueError, "can't be combined with budget"),
        ({"budget": {"flops": 0.5}, "calibration": images(2)}, ValueError, "'macs', 'params' and 'ms', not"),
        ({"budget": {"macs": 0.5, "params": 0.5}, "calibration": images(2)}, ValueError, "exactly one of the keys"),
        ({"budget": {"macs": 0.0}, "calibration": images(2)}, ValueError, "must be above 0 and at most 1"),
        ({"budget": {"macs": float("nan")}, "calibration": images(2)}, ValueError, "must be above 0 and at most 1"),
        ({"budget": {"macs": "half"}, "calibration": images(2)}, TypeError, "must be a number"),
        ({"budget": 0.5, "calibration": images(2)}, TypeError, "budget must be"),
        ({"budget": {"macs": 0.05}, "calibration": images(2)}, ValueError, "budget of 0.05 of all macs can't be kept"),
        ({"budget": {"macs": 0.5}, "calibration": images(0)}, ValueError, "calibration gave no examples"),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        sgfx.compile(DENSE, groups=2, **options)


def test_layers_outside_every_traced_part_need_a_ratio():
    dense = made(Untraceable())
    options = {"groups": 2, "example_inputs": images(1), "budget": {"params": 0.8}, "calibration": images(8)}
    with pytest.raises(sgfx.InputError, match="'alone' is in none"):
        sgfx.compile(dense, **options)
    small = sgfx.compile(dense, ignore="alone", **options)
    assert left(dense, small, "params") == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("errors", "best", "tried"),
    [
        ([0.3, 0.2, 0.1], 0.0, [1.0, 0.5, 0.0]),
        ([0.3, 0.2, 0.25], 0.5, [1.0, 0.5, 0.0]),
        ([0.2, 0.3, 0.1], 1.0, [1.0, 0.5]),
        ([float("nan")], 1.0, [1.0]),
    ],
    ids=str,
)
def test_whole_networks_are_tried_as_long_as_they_get_better(errors, best, tried):
    found, left_over = [], iter(errors)
    assert best_part(lambda part: found.append(part) or next(left_over)) == best
    assert found == tried


@pytest.mark.parametrize("even", [True, False])
def test_the_ratios_are_those_of_the_network_that_is_judged_best(monkeypatch, even):
    """Where the judge wants even ratios they are as even as truncation allows, and cost the same."""
    ratios = []

    def judge(dense, small, batches, leaves, progress):
        ratios.append([plan.achieved_ratio for plan in sgfx.plans(small).values() if plan.grouped])
        return float(np.std(ratios[-1])) * (1 if even else -1)

    monkeypatch.setattr("passes.calibration.budget.spending.held_out_error", judge)
    small = sgfx.compile(DENSE, groups=4, budget={"macs": 0.5}, calibration=images(64))
    found = [plan.achieved_ratio for plan in sgfx.plans(small).values() if plan.grouped]
    assert found == ratios[-1 if even else 0]
    assert len(ratios) == (3 if even else 2)
    assert np.std(ratios[2]) < np.std(ratios[1]) < np.std(ratios[0]) if even else np.std(ratios[1]) < np.std(ratios[0])
    assert left(DENSE, small, "macs") == pytest.approx(0.5, abs=0.01)


def test_a_network_is_judged_by_examples_that_it_was_not_fitted_to():
    x = images(64)
    small = sgfx.compile(DENSE, groups=4, ratio=0.5)
    judged = torch.arange(64) % 4 == 3
    by_hand = sgfx.calibrate(
        DENSE, sgfx.compile(DENSE, groups=4, ratio=0.5), [x[:32][~judged[:32]], x[32:][~judged[32:]]]
    )
    halves = x[judged].split(8)
    wanted = sum(error_over_variance(by_hand(half), DENSE(half)) for half in halves) / 2
    found = held_out_error(DENSE, small, read_examples(x, "data", DENSE))
    assert found == pytest.approx(wanted, rel=1e-6)


def error_over_variance(y, wanted) -> float:
    return float(((y - wanted).square().mean() / wanted.var(correction=0)).detach())


def test_outputs_that_can_not_be_compared_leave_the_ratios_of_the_curves(monkeypatch):
    tried = []
    monkeypatch.setattr("passes.calibration.budget.judging.distance", lambda *_: tried.append(1) or refuse())

    def refuse():
        raise sgfx.InputError("other shapes")

    small = sgfx.compile(DENSE, groups=4, budget={"macs": 0.5}, calibration=images(64))
    assert len(tried) == 1
    assert left(DENSE, small, "macs") == pytest.approx(0.5, abs=0.01)


def test_one_example_in_four_is_judged_by():
    x = torch.arange(10.0)[:, None]
    fitted, judged = parted([(x, x + 10), (x[:3],), ([x], x), ([x + 1], x), (x[:2],)])
    assert [len(batch[0]) for batch in fitted] == [8, 3, 1, 1]
    assert judged[0][0].flatten().tolist() == [3, 7]
    assert judged[0][1].flatten().tolist() == [13, 17]
    assert [len(batch[0]) for batch in judged[1:]] == [2]
