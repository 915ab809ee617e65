"""One harness for every pass: facts, `modified`, idempotence, equal outputs; and what the manager holds passes to."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.compression.lowering import Lowering
from passes.compression.masking import Masking
from passes.errors import InputError, PassError
from passes.infra.compilation import Pass, Unit
from passes.infra.manager import run_passes
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked
from passes.layers.plan import plans
from passes.options.checks import checked_settings
from passes.pipeline import ANALYSIS, LOWERING, PLANNING, PRUNING_STEP


class Net(nn.Module):
    """A residual sum, a concatenation, norms, a branch on the mode, and a linear head."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.right = nn.Conv2d(width, width, 1)
        self.auxiliary = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(2 * width, 10)
        self.dropout = dropout

    def forward(self, x):
        y = torch.relu(self.norm(self.stem(x)))
        if self.training:
            y = y + self.auxiliary(y)
        y = torch.cat([y + self.left(y), self.right(y)], 1)
        return self.head(y.mean((2, 3)))


def fresh_unit(**options):
    torch.manual_seed(0)
    model = Net().double()
    return Unit(model, checked_settings(model, **({"ratio": 0.5, "groups": 3} | options)))


IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", range(len(ANALYSIS + PLANNING)))
def test_passes_that_analyse_write_their_facts_and_leave_the_model(number):
    unit = fresh_unit()
    run_passes((ANALYSIS + PLANNING)[:number], unit)
    each = (ANALYSIS + PLANNING)[number]
    assert not any(unit.knows(fact) for fact in each.ensures)
    before = copy.deepcopy(unit.model)
    assert run_passes([each], unit) is False
    assert all(unit.knows(fact) for fact in each.ensures)
    assert run_passes([each], unit) is False
    assert torch.equal(unit.model(IMAGES), before(IMAGES))


@pytest.mark.parametrize(("rewriting", "layers"), [(Masking(), Masked), (Lowering(), Grouped)])
def test_passes_that_rewrite_say_so_once_and_agree_with_each_other(rewriting, layers):
    unit = fresh_unit()
    run_passes(ANALYSIS + PLANNING, unit)
    oracle = copy.deepcopy(unit.model)
    for path, plan in unit.plans.items():
        if plan.grouped:
            weight = oracle.get_submodule(path).weight
            weight.data *= plan.keep[plan.labels].view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    assert run_passes([rewriting], unit) is True
    assert run_passes([rewriting], unit) is False
    assert {p for p, m in unit.model.named_modules() if isinstance(m, layers)} == unit.targets.keys()
    assert plans(unit.model) == unit.plans
    for training in (False, True):
        unit.model.train(training)
        oracle.train(training)
        assert torch.allclose(unit.model(IMAGES), oracle(IMAGES), rtol=1e-10, atol=1e-12)


def test_masking_again_with_other_plans_updates_masks_in_place():
    unit = fresh_unit()
    run_passes(ANALYSIS + PRUNING_STEP, unit)
    layer = unit.model.get_submodule("left")
    mask, weight = layer.mask, layer.weight
    unit.limit = 0.25
    assert run_passes(PRUNING_STEP, unit) is True
    assert unit.model.get_submodule("left") is layer
    assert layer.mask is mask
    assert layer.weight is weight
    assert torch.equal(mask, unit.plans["left"].mask())


class Broken(Pass):
    """A pass whose behaviour is given."""

    name = "broken"
    requires = ()
    ensures = ()

    def __init__(self, run=lambda unit: False, problem=None):
        self._run, self._problem = run, problem

    def run(self, unit):
        return self._run(unit)

    def check(self, unit):
        return self._problem


class Promising(Broken):
    ensures = ("plans",)


def failing(error):
    def run(unit):
        raise error

    return run


def test_a_pass_that_lacks_what_it_requires_is_named():
    with pytest.raises(PassError, match=r"pass 'selection' requires regions \(ran before it: nothing\)"):
        run_passes(ANALYSIS[1:], fresh_unit())


def test_a_failure_names_the_pass_and_what_ran_before_and_chains_its_cause():
    cause = KeyError("conv")
    with pytest.raises(PassError, match=r"pass 'broken' failed \(ran before it: trace, selection\): 'conv'") as error:
        run_passes([*ANALYSIS, Broken(failing(cause))], fresh_unit())
    assert error.value.__cause__ is cause


def test_bad_input_passes_through_as_it_is():
    with pytest.raises(InputError, match=r"^the weights are bad$"):
        run_passes([Broken(failing(InputError("the weights are bad")))], fresh_unit())


def test_promises_and_results_are_checked():
    with pytest.raises(PassError, match="pass 'broken' did not leave plans"):
        run_passes([Promising()], fresh_unit())
    with pytest.raises(PassError, match=r"pass 'broken' left a wrong result \(ran before it: trace\): all is lost"):
        run_passes([ANALYSIS[0], Broken(problem="all is lost")], fresh_unit())


def test_reading_a_fact_that_no_pass_has_written_is_an_error():
    with pytest.raises(PassError, match="no pass has written 'plans' yet"):
        _ = fresh_unit().plans


def test_wrong_results_are_found_by_the_passes_own_checks():
    unit = fresh_unit()
    run_passes(ANALYSIS + PRUNING_STEP, unit)
    unit.model.get_submodule("left").mask.fill_(True)
    assert "mask of layer 'left'" in (Masking().check(unit) or "")
    run_passes(LOWERING, unit)
    unit.model.right = nn.Conv2d(8, 8, 1)
    assert "layer 'right' was not lowered" in (Lowering().check(unit) or "")


@st.composite
def networks(draw):
    """Small random graphs: residual sums, concatenations, norms, shared calls, branches on the mode."""
    blocks = draw(st.lists(st.sampled_from(["plain", "residual", "concat", "repeat", "branch", "norm"]), max_size=5))
    return Random(blocks, draw(st.sampled_from([4, 6, 9])), draw(st.booleans()))


class Random(nn.Module):
    """A network made of named blocks."""

    def __init__(self, blocks, width, bias):
        super().__init__()
        self.kinds = blocks
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        channels = width
        for kind in blocks:
            if kind == "norm":
                self.blocks.append(nn.BatchNorm2d(channels))
                continue
            out = width if kind == "plain" else channels
            self.blocks.append(nn.Conv2d(channels, out, draw_kernel(kind), padding="same", bias=bias))
            channels = channels + out if kind == "concat" else out
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "concat":
                x = torch.cat([x, block(x)], 1)
            elif kind == "residual":
                x = torch.relu(x + block(x))
            elif kind == "repeat":
                x = block(torch.relu(block(x)))
            elif kind == "branch":
                x = x + block(x) if self.training else block(x)
            else:
                x = block(x)
        return self.head(x.mean((2, 3)))


def draw_kernel(kind):
    return 3 if kind in ("plain", "residual") else 1


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 6), st.floats(0, 0.95), st.integers(0, 1000))
def test_masked_equals_lowered_on_random_networks(model, groups, ratio, seed):
    model = model.double()
    unit = Unit(model, checked_settings(model, groups=groups, ratio=ratio, seed=seed))
    run_passes(ANALYSIS + PRUNING_STEP, unit)
    small = Unit(copy.deepcopy(model), unit.settings)
    small.plans = unit.plans
    run_passes(LOWERING, small)
    for training in (False, True):
        outputs = []
        for each in (model, small.model):
            each.train(training)
            each.zero_grad()
            output = each(IMAGES)
            output.square().sum().backward()
            outputs.append(output.detach())
        assert torch.allclose(outputs[0], outputs[1], rtol=1e-10, atol=1e-11)
        for path, plan in unit.plans.items():
            if plan.grouped:
                compare_gradients(model.get_submodule(path).weight.grad, small.model.get_submodule(path), plan)


def compare_gradients(dense, grouped, plan):
    order = torch.argsort(plan.labels, stable=True)
    kept = dense[order][plan.keep[plan.labels][order]]
    assert torch.allclose(grouped.weight.grad.view_as(kept), kept, rtol=1e-9, atol=1e-11)
