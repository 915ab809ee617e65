"""Calibration and budgets as lists of passes: what each asks for and finds wrong, and lists without some of them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import sgfx
from passes.calibration.budget.allotment import BUDGET, FIT
from passes.calibration.budget.error_curves import CURVES, GRID, ErrorCurves
from passes.calibration.budget.spending import Spending
from passes.calibration.calibrating import DENSE, SEEN_NORMS, UNCALIBRATED, Calibration
from passes.calibration.data import EXAMPLES, read_examples
from passes.compression.selection import TARGETS
from passes.errors import PassError
from passes.infra.compilation import Compilation, Pass
from passes.infra.manager import run_passes
from passes.infra.progress import silent
from passes.layers.grouped import Grouped
from passes.options.checks import checked_settings
from passes.options.settings import SETTINGS, Settings
from passes.pipeline import ANALYSIS, GROUPING, INSPECTION, PRUNING, budget, calibration
from sgfx.budgets import budget_of
from tests.passes.calibration.test_calibrating_regions import Residual, images, made

DENSE_MODEL = made(Residual())


def small():
    return sgfx.compile(DENSE_MODEL, groups=4, ratio=0.5)


def started(model, **options):
    batches = read_examples(images(32), "data", DENSE_MODEL)
    return Compilation(model, {SETTINGS: Settings(**options), DENSE: DENSE_MODEL, EXAMPLES: batches})


def planned(share):
    """A compilation of the dense model with a budget, before any pass."""
    batches = read_examples(images(32), "data", DENSE_MODEL)
    known = {BUDGET: budget_of("params", share, batches[0], eliminating=False), EXAMPLES: batches}
    return Compilation(DENSE_MODEL, {SETTINGS: checked_settings(DENSE_MODEL, groups=4, ratio=0.0), **known})


def test_calibrating_without_a_look_at_the_examples_gives_the_same():
    model, wanted = small(), sgfx.calibrate(DENSE_MODEL, small(), images(32), progress=False)
    compilation = run_passes(calibration(silent), started(model))
    assert compilation[UNCALIBRATED] == []
    for name, value in wanted.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(model.state_dict()[name], value), name


def test_looking_at_the_examples_changes_nothing():
    model = small()
    before = copy.deepcopy(model.state_dict())
    compilation = run_passes(INSPECTION, started(model))
    assert [norm.path for norm in compilation[SEEN_NORMS]] == [
        path for path, module in DENSE_MODEL.named_modules() if isinstance(module, nn.BatchNorm2d)
    ]
    for name, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(model.state_dict()[name], value)


def test_layers_in_leaf_modules_are_left():
    layers = [path for path, module in small().named_modules() if isinstance(module, Grouped)]
    model = nn.Sequential(small())
    dense = nn.Sequential(DENSE_MODEL)
    facts = {SETTINGS: Settings(leaf_modules=("0",)), DENSE: dense, EXAMPLES: [(images(4),)]}
    compilation = run_passes([Calibration()], Compilation(model, facts))
    assert compilation[UNCALIBRATED] == [f"0.{path}" for path in layers]


def test_weights_that_are_no_numbers_are_found():
    model = small()
    path, layer = next((path, module) for path, module in model.named_modules() if isinstance(module, Grouped))
    layer.weight.data[0] = torch.nan
    found = Calibration().check(Compilation(model, {UNCALIBRATED: []}))
    assert found == f"the weight of layer {path!r} holds NaN or infinite values"
    assert Calibration().check(Compilation(model, {UNCALIBRATED: [path]})) is None


def test_a_budget_is_kept_by_a_list_of_passes():
    compilation = run_passes((*ANALYSIS, *GROUPING, *budget(silent), *PRUNING), planned(0.5))
    by_hand = sgfx.compile(DENSE_MODEL, groups=4, budget={"params": 0.5}, calibration=images(32))
    ratios = {path: plan.achieved_ratio for path, plan in sgfx.plans(by_hand).items() if plan.grouped}
    assert {path: target.ratio for path, target in compilation[TARGETS].items()} == pytest.approx(ratios)
    assert len(set(ratios.values())) > 1
    assert (compilation[FIT].missed, compilation[FIT].model) == ("", None)
    assert all(curve.shape == (len(GRID),) for curve in compilation[CURVES].values())


class Flat(Pass):
    """Other curves: every layer can do without as much as any other."""

    name = "flat"
    requires = (TARGETS,)
    ensures = (CURVES,)

    def run(self, compilation):
        return {CURVES: {path: np.array(GRID) ** 2 for path in compilation[TARGETS]}}


def test_the_curves_can_be_replaced():
    compilation = run_passes((*ANALYSIS, *GROUPING, Flat(), Spending(), *PRUNING), planned(0.5))
    rest = sum(p.numel() for p in DENSE_MODEL.parameters())
    layers = {path: DENSE_MODEL.get_submodule(path).weight.numel() for path in compilation[TARGETS]}
    left = rest - sum(layers[path] * target.ratio for path, target in compilation[TARGETS].items())
    assert left / rest == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("passes", "missing"),
    [
        ([Spending()], r"'spending' requires error curves \(ran before it: trace, selection, importance, grouping\)"),
        ([ErrorCurves(), *PRUNING, Calibration()], "'calibration' requires dense"),
    ],
)
def test_what_is_missing_is_named(passes, missing):
    with pytest.raises(PassError, match=missing):
        run_passes((*ANALYSIS, *GROUPING, *passes), planned(0.5))


def test_curves_that_fall_and_ratios_that_can_not_be_met_are_found():
    compilation = run_passes((*ANALYSIS, *GROUPING), planned(0.5))
    path = next(iter(compilation[TARGETS]))
    falling = Compilation(DENSE_MODEL, {CURVES: {path: np.linspace(1, 0, len(GRID))}})
    assert ErrorCurves().check(falling) == f"the error of layer {path!r} falls where more is pruned"
    compilation.learn({TARGETS: {path: type(compilation[TARGETS][path])(4, 0.5001234)}})
    assert Spending().check(compilation) == f"layer {path!r} can't be pruned to a ratio of 0.5001234"
