"""One harness for every pass: facts, `modified`, idempotence, equal outputs; and what the manager holds passes to."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.compression.lowering import Lowering
from passes.compression.masking import Masking
from passes.compression.pruning import PLANS
from passes.compression.selection import TARGETS
from passes.errors import InputError, PassError
from passes.infra.compilation import Compilation, Fact, Pass
from passes.infra.manager import run_passes
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked
from passes.layers.plan import plans
from passes.options.checks import checked_settings
from passes.options.settings import SETTINGS
from passes.pipeline import ANALYSIS, GROUPING, LOWERING, PRUNING, pruning_step
from passes.tracing.regions import REGIONS

PLANNING = GROUPING + PRUNING


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


def fresh(**options):
    torch.manual_seed(0)
    model = Net().double()
    return Compilation(model, {SETTINGS: checked_settings(model, **({"ratio": 0.5, "groups": 3} | options))})


IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", range(len(ANALYSIS + PLANNING)))
def test_passes_that_analyse_write_their_facts_and_leave_the_model(number):
    compilation = fresh()
    run_passes((ANALYSIS + PLANNING)[:number], compilation)
    each = (ANALYSIS + PLANNING)[number]
    assert not any(fact in compilation for fact in each.ensures)
    before, modules = copy.deepcopy(compilation.model), dict(compilation.model.named_modules())
    run_passes([each, each], compilation)
    assert all(fact in compilation for fact in each.ensures)
    assert dict(compilation.model.named_modules()) == modules
    assert torch.equal(compilation.model(IMAGES), before(IMAGES))


@pytest.mark.parametrize(("rewriting", "layers"), [(Masking(), Masked), (Lowering(), Grouped)])
def test_passes_that_rewrite_do_so_once_and_agree_with_each_other(rewriting, layers):
    compilation = fresh()
    run_passes(ANALYSIS + PLANNING, compilation)
    oracle = copy.deepcopy(compilation.model)
    for path, plan in compilation[PLANS].items():
        if plan.grouped:
            weight = oracle.get_submodule(path).weight
            weight.data *= plan.keep[plan.labels].view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    run_passes([rewriting], compilation)
    assert REGIONS not in compilation
    modules = dict(compilation.model.named_modules())
    run_passes([rewriting], compilation)
    assert dict(compilation.model.named_modules()) == modules
    assert {p for p, m in compilation.model.named_modules() if isinstance(m, layers)} == compilation[TARGETS].keys()
    assert plans(compilation.model) == compilation[PLANS]
    for training in (False, True):
        compilation.model.train(training)
        oracle.train(training)
        assert torch.allclose(compilation.model(IMAGES), oracle(IMAGES), rtol=1e-10, atol=1e-12)


def test_masking_again_with_other_plans_updates_masks_in_place():
    compilation = fresh()
    run_passes(ANALYSIS + pruning_step(1.0), compilation)
    layer = compilation.model.get_submodule("left")
    mask, weight = layer.mask, layer.weight
    before = mask.clone()
    run_passes(pruning_step(0.25), compilation)
    assert compilation.model.get_submodule("left") is layer
    assert layer.mask is mask
    assert layer.weight is weight
    assert torch.equal(mask, compilation[PLANS]["left"].mask())
    assert not torch.equal(mask, before)


class Broken(Pass):
    """A pass whose behaviour is given."""

    name = "broken"
    requires = ()
    ensures = ()

    def __init__(self, run=lambda compilation: None, problem=None):
        self._run, self._problem = run, problem

    def run(self, compilation):
        return self._run(compilation)

    def check(self, compilation):
        return self._problem


class Promising(Broken):
    ensures = (PLANS,)


def failing(error):
    def run(compilation):
        raise error

    return run


def test_a_pass_that_lacks_what_it_requires_is_named():
    with pytest.raises(PassError, match=r"pass 'selection' requires regions \(ran before it: nothing\)"):
        run_passes(ANALYSIS[1:], fresh())


def test_a_failure_names_the_pass_and_what_ran_before_and_chains_its_cause():
    cause = KeyError("conv")
    with pytest.raises(PassError, match=r"pass 'broken' failed \(ran before it: trace, selection\): 'conv'") as error:
        run_passes([*ANALYSIS, Broken(failing(cause))], fresh())
    assert error.value.__cause__ is cause


def test_bad_input_passes_through_as_it_is():
    with pytest.raises(InputError, match=r"^the weights are bad$"):
        run_passes([Broken(failing(InputError("the weights are bad")))], fresh())


def test_promises_and_results_are_checked():
    with pytest.raises(PassError, match="pass 'broken' did not leave plans"):
        run_passes([Promising()], fresh())
    with pytest.raises(PassError, match=r"pass 'broken' left a wrong result \(ran before it: trace\): all is lost"):
        run_passes([ANALYSIS[0], Broken(problem="all is lost")], fresh())


def test_reading_a_fact_that_no_pass_has_written_is_an_error():
    with pytest.raises(PassError, match="'plans' is not known: no pass has written it"):
        _ = fresh()[PLANS]


def test_a_pass_leaves_no_more_than_it_states():
    with pytest.raises(PassError, match=r"pass 'broken' left plans, which it does not state \(ran before"):
        run_passes([Broken(lambda _: {PLANS: {}})], fresh())


def test_a_pass_reads_no_more_than_it_states():
    with pytest.raises(PassError, match=r"pass 'broken' failed .*'settings' is not known: .* does not require it"):
        run_passes([Broken(lambda compilation: compilation[SETTINGS])], fresh())


def test_facts_are_told_apart_by_themselves_and_not_by_their_names():
    with pytest.raises(PassError, match="did not leave plans"):
        run_passes([Promising(lambda _: {Fact("plans"): {}})], fresh())


def test_wrong_results_are_found_by_the_passes_own_checks():
    compilation = fresh()
    run_passes(ANALYSIS + pruning_step(1.0), compilation)
    compilation.model.get_submodule("left").mask.fill_(True)
    assert "mask of layer 'left'" in (Masking().check(compilation) or "")
    run_passes(LOWERING, compilation)
    compilation.model.right = nn.Conv2d(8, 8, 1)
    assert "layer 'right' was not lowered" in (Lowering().check(compilation) or "")


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
    asked = checked_settings(model, groups=groups, ratio=ratio, seed=seed)
    compilation = Compilation(model, {SETTINGS: asked})
    run_passes(ANALYSIS + pruning_step(1.0), compilation)
    small = Compilation(copy.deepcopy(model), {SETTINGS: asked, PLANS: compilation[PLANS]})
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
        for path, plan in compilation[PLANS].items():
            if plan.grouped:
                compare_gradients(model.get_submodule(path).weight.grad, small.model.get_submodule(path), plan)


def compare_gradients(dense, grouped, plan):
    order = torch.argsort(plan.labels, stable=True)
    kept = dense[order][plan.keep[plan.labels][order]]
    assert torch.allclose(grouped.weight.grad.view_as(kept), kept, rtol=1e-9, atol=1e-11)
