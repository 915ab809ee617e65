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
from passes.budgeting import GRID, allocate
from tests.passes.test_calibrating_regions import Residual, images, made
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
    ratios = allocate(curves, costs, limit)
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
    assert allocate([convex(1.0)], [100.0], 1.0) is None


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"params": 0.6}, {"macs": 1}], ids=str)
def test_what_remains_is_the_budget(budget):
    small = sgfx.compile(DENSE, groups=2, budget=budget, calibration=images(16), overrides={"head": {"ratio": 0.2}})
    found = sgfx.report(DENSE, small, images(1))
    ((measure, share),) = budget.items()
    left = found.macs / found.macs_dense if measure == "macs" else found.params / found.params_dense
    assert left == pytest.approx(share, abs=0.03)  # these layers have 8 inputs: one centroid entry is 3 % of a layer
    assert sgfx.plans(small)["head"].requested_ratio == 0.2


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
        ({"budget": {"flops": 0.5}, "calibration": images(2)}, ValueError, "'macs' and 'params', not"),
        ({"budget": {"macs": 0.5, "params": 0.5}, "calibration": images(2)}, ValueError, "exactly one of the keys"),
        ({"budget": {"macs": 0.0}, "calibration": images(2)}, ValueError, "must lie in"),
        ({"budget": {"macs": float("nan")}, "calibration": images(2)}, ValueError, "must lie in"),
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
    found = sgfx.report(dense, small, images(1))
    assert found.params / found.params_dense == pytest.approx(0.8, abs=0.03)
