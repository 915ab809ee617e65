"""`sgfx.Pruner`: the local scheme in a training loop of the user's own."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

import models_zoo
import sgfx
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked

IMAGES = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def lenet():
    torch.manual_seed(0)
    return models_zoo.create("lenet5")


def pruner(**options):
    return sgfx.Pruner(lenet(), **({"groups": 4, "ratio": 0.6, "step": 0.2} | options))


def nudge(model, amount=0.01):
    """Stands for training: a deterministic change of all weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.99).add_(amount * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def masks(model):
    return {path: module.mask.clone() for path, module in model.named_modules() if isinstance(module, Masked)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize(
    ("ratio", "step", "count"),
    [(0.8, 0.05, 16), (0.75, 0.05, 15), (0.3, 0.1, 3), (0.5, 0.2, 3), (0.6, 0.2, 3), (0.1, 0.3, 1), (0.0, 0.1, 1)],
)
def test_the_number_of_steps_and_their_ratios(ratio, step, count):
    steps = list(each := pruner(ratio=ratio, step=step))
    assert len(each) == len(steps) == count
    assert [s.index for s in steps] == list(range(1, count + 1))
    assert [s.requested_ratio for s in steps] == pytest.approx([min(n * step, ratio) for n in range(1, count + 1)])
    for each_step in steps:
        assert each_step.achieved_ratio == pytest.approx(each_step.requested_ratio, abs=0.05)


def test_a_record_is_frozen():
    step = next(iter(pruner()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.index = 3


def test_each_layer_stops_at_its_own_ratio():
    each = pruner(ratio=0.6, linear_ratio=0.3, overrides={"fc2": {"ratio": 0.1}})
    asked = []
    for _ in each:
        plans = sgfx.plans(each.model)
        asked.append([plans[path].requested_ratio for path in ("conv2", "fc1", "fc2")])
    assert asked == [[0.2, 0.2, 0.1], [0.4, 0.3, 0.1], [0.6, 0.3, 0.1]]


def test_masked_layers_are_there_from_the_start_and_parameters_stay_the_same_objects():
    model = lenet()
    each = sgfx.Pruner(model, groups=4, ratio=0.6, step=0.2)
    assert torch.equal(each.model(IMAGES), model(IMAGES))
    assert all(mask.all() for mask in masks(each.model).values())
    parameters, buffers = list(each.model.parameters()), list(each.model.buffers())
    optimizer = torch.optim.SGD(each.model.parameters(), lr=0.01, momentum=0.9)
    for _ in each:
        optimizer.zero_grad()
        each.model(IMAGES).square().mean().backward()
        optimizer.step()
    assert all(a is b for a, b in zip(each.model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(each.model.buffers(), buffers, strict=True))
    assert [name for name, _ in each.model.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert "conv2._extra_state" in each.model.state_dict()
    assert isinstance(each.model.conv2, nn.Conv2d)


def test_the_users_model_is_untouched():
    model = lenet()
    before = copy.deepcopy(model.state_dict())
    each = sgfx.Pruner(model, ratio=0.5, step=0.25)
    for _ in each:
        nudge(each.model)
    each.lower()
    assert same(dict(model.state_dict()), dict(before))
    assert not any(isinstance(module, Masked | Grouped) for module in model.modules())


def test_every_step_groups_anew_from_the_masked_weights_and_reopened_weights_have_their_stored_value():
    each = pruner(ratio=0.8, step=0.4)
    steps = iter(each)
    next(steps)
    layer = each.model.fc1
    first, stored = layer.mask.clone(), layer.weight.detach().clone()
    with torch.no_grad():  # the kept weights become as good as nothing, so the next step prefers no connection
        layer.weight[first] *= 1e-6
    next(steps)
    # Pruned connections count as zero, whatever is stored under the mask.
    assert not (layer.mask & ~first).any() or layer.weight[layer.mask & ~first].equal(stored[layer.mask & ~first])
    effective = (layer.weight * first).abs()
    plan = sgfx.plans(each.model)["fc1"]
    for group in range(plan.groups):
        centroid = effective[plan.labels == group].mean(0)
        kept, cut = centroid[plan.keep[group]], centroid[~plan.keep[group]]
        if len(kept) and len(cut):
            assert kept.min() >= cut.max()


@pytest.mark.parametrize("leave", ["break", "error"])
def test_leaving_the_loop_inside_a_step_repeats_it_without_clustering_again(leave):
    each = pruner()
    try:
        for step in each:
            if step.index == 2:
                nudge(each.model, 10.0)  # other weights would give other groups
                if leave == "break":
                    break
                raise RuntimeError("out of memory")
    except RuntimeError:
        assert leave == "error"
    before, plans = masks(each.model), sgfx.plans(each.model)
    repeated = next(iter(each))
    assert repeated == step
    assert same(masks(each.model), before)
    assert sgfx.plans(each.model) == plans
    assert [s.index for s in each] == [2, 3]
    assert list(each) == []


CONTINUE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_pruner import masks, nudge, pruner
each = pruner()
each.load_state_dict(torch.load(sys.argv[1], weights_only=True))
for step in each:
    nudge(each.model)
    print(step.index)
torch.save(masks(each.model), sys.argv[1] + ".masks")
"""


def test_a_new_process_goes_on_from_the_middle_of_a_step(tmp_path, request):
    whole = pruner()
    for _ in whole:
        nudge(whole.model)
    each = pruner()
    for step in each:
        if step.index == 2:
            torch.save(each.state_dict(), tmp_path / "state")
            break
        nudge(each.model)
    command = [sys.executable, "-c", CONTINUE, str(tmp_path / "state"), str(request.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "3"]
    assert same(torch.load(tmp_path / "state.masks", weights_only=True), masks(whole.model))


def test_a_state_from_before_the_first_step_starts_at_the_first():
    each, other = pruner(), pruner()
    nudge(other.model)
    each.load_state_dict(other.state_dict())
    assert torch.equal(each.model(IMAGES), other.model(IMAGES))
    assert [step.index for step in each] == [1, 2, 3]


def tampered(state, **changes):
    return copy.deepcopy(state) | changes


def test_states_that_do_not_belong_are_refused_and_nothing_is_changed():
    source = pruner()
    next(iter(source))
    state = source.state_dict()
    plans, model = copy.deepcopy(state["plans"]), copy.deepcopy(state["model"])
    plans["fc1"]["labels"] = plans["fc1"]["labels"] + 5
    fewer = {path: saved for path, saved in state["plans"].items() if path != "fc1"}
    del model["fc1.weight"]
    each = pruner()
    before = copy.deepcopy(each.state_dict())
    for bad, message in (
        ({"model": {}}, "not the state of a Pruner"),
        (tampered(state, version=99), "version 99, this sgfx reads version 1"),
        (tampered(state, index=4), "the state stands at step 4 of 3"),
        (pruner(groups=5).state_dict(), r"other options: groups \(5 in the state, 4 here\)"),
        (tampered(state, plans=plans), "labels must use every group"),
        (tampered(state, plans=fewer), "it prunes other layers"),
        (tampered(state, model=model), r"another model: fc1\.weight differ \(1 in all\)"),
    ):
        with pytest.raises(sgfx.InputError, match=message):
            each.load_state_dict(bad)
        assert same(each.state_dict()["model"], before["model"])
        assert (each.state_dict()["index"], each.state_dict()["open"]) == (0, False)


@pytest.mark.parametrize("key", ["version", "options", "index", "open", "plans", "model"])
@pytest.mark.parametrize("value", [None, 7, "x", [], {}, {"fc1": None}, {"conv2": 3, "fc1": 3, "fc2": 3, "fc3": 3}])
def test_damaged_states_are_refused(key, value):
    source = pruner()
    next(iter(source))
    with pytest.raises(sgfx.InputError, match="state"):
        pruner().load_state_dict(source.state_dict() | {key: value})


class Counting(nn.Module):
    """Keeps a state that is no tensor, as `get_extra_state` allows."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]

    def forward(self, x):
        return x


def test_states_may_hold_what_is_no_tensor():
    source, other = (sgfx.Pruner(nn.Sequential(lenet(), Counting()), ratio=0.6, step=0.2) for _ in range(2))
    next(iter(source))
    source.model[1].count = 3
    other.load_state_dict(source.state_dict())
    assert other.model[1].count == 3


def test_a_hook_on_the_masked_model_moves_along_and_its_handle_removes_it():
    each, calls = pruner(), []
    handle = each.model.fc1.register_forward_hook(lambda *_: calls.append(1))
    next(iter(each))
    small = each.lower()
    small(IMAGES)
    handle.remove()
    small(IMAGES)
    assert calls == [1]


def test_lowering_is_exact_and_ends_the_pruner():
    each = pruner()
    for _ in each:
        nudge(each.model)
    expected = each.model(IMAGES).detach()
    small = each.lower()
    assert small is each.model
    assert torch.allclose(small(IMAGES), expected, rtol=1e-4, atol=1e-6)
    assert isinstance(small.fc1, Grouped)
    for action in (each.lower, lambda: list(each), each.state_dict, lambda: each.load_state_dict({})):
        with pytest.raises(sgfx.InputError, match=r"lower\(\) was called, and its result is the model"):
            action()


def test_lowering_needs_a_step_and_may_come_early():
    each = pruner()
    with pytest.raises(sgfx.InputError, match="nothing is pruned yet: iterate over the pruner"):
        each.lower()
    next(iter(each))
    assert sgfx.plans(each.lower())["fc1"].requested_ratio == 0.2


@pytest.mark.parametrize("step", [0, 1, -0.1, float("nan")])
def test_a_step_outside_zero_to_one_is_refused(step):
    with pytest.raises(sgfx.InputError, match="step"):
        pruner(step=step)


def test_bad_weights_in_the_middle_leave_the_step_before():
    each = pruner()
    next(iter(each))
    before = masks(each.model)
    steps = iter(each)
    next(steps)
    stored = each.model.fc2.weight.detach().clone()
    with torch.no_grad():
        each.model.fc2.weight[each.model.fc2.mask] = float("nan")
    with pytest.raises(sgfx.InputError, match="layer 'fc2'"):
        next(steps)
    assert same(masks(each.model), before)
    with torch.no_grad():
        each.model.fc2.weight.copy_(stored)
    assert [step.index for step in each] == [2, 3]


@pytest.mark.parametrize("kind", ["deepcopy", "state_dict"])
def test_masked_models_can_be_copied_and_saved(kind):
    each = pruner()
    next(iter(each))
    twin = copy.deepcopy(each.model) if kind == "deepcopy" else pruner().model
    twin.load_state_dict(each.model.state_dict())
    assert torch.equal(twin(IMAGES), each.model(IMAGES))
