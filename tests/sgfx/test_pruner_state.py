"""`Pruner.load_state_dict`: all of a state or nothing, at whatever step the pruner stands."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import sgfx
from passes.layers.masked import Masked
from tests.sgfx.test_pruner import IMAGES, lenet, masks, nudge, pruner, same


def at_step(index, each=None):
    each = pruner() if each is None else each
    for step in each:
        nudge(each.model)
        if step.index == index:
            break
    return each


def everything(each):
    """All that a pruner is: position, plans, masks, values."""
    state = each.state_dict()
    values = {name: copy.deepcopy(value) for name, value in state["model"].items() if isinstance(value, torch.Tensor)}
    return state["index"], state["open"], sgfx.plans(each.model), masks(each.model), values


def assert_same(each, before):
    after = everything(each)
    assert after[:3] == before[:3]
    assert same(after[3], before[3])
    assert same(after[4], before[4])


def test_the_state_of_step_zero_takes_the_plans_and_masks_of_an_advanced_pruner_away():
    fresh, each = pruner(), at_step(2)
    nudge(fresh.model)
    each.load_state_dict(fresh.state_dict())
    assert_same(each, everything(fresh))
    assert sgfx.plans(each.model) == {}
    assert all(mask.all() for mask in masks(each.model).values())
    assert torch.equal(each.model(IMAGES), fresh.model(IMAGES))
    with pytest.raises(sgfx.InputError, match="nothing is pruned yet"):
        each.lower()
    assert_same(at_step(3, each), everything(at_step(3, fresh)))
    assert torch.equal(each.lower()(IMAGES), fresh.lower()(IMAGES))


@pytest.mark.parametrize("target", [1, 2, 3])
@pytest.mark.parametrize("source", [0, 1, 3])
def test_a_state_of_any_step_goes_into_a_pruner_at_any_step(source, target):
    saved, each = at_step(source) if source else pruner(), at_step(target)
    each.load_state_dict(saved.state_dict())
    assert_same(each, everything(saved))
    for layer in each.model.modules():
        if isinstance(layer, Masked) and source:
            assert torch.equal(layer.mask, sgfx.plans(each.model)[next(iter(paths(each.model, layer)))].mask())
    copy.deepcopy(saved.model).load_state_dict(each.model.state_dict())


def paths(model, layer):
    return [path for path, module in model.named_modules() if module is layer]


class Stubborn(nn.Module):
    """Refuses a state of its own."""

    def get_extra_state(self):
        return {"size": 3}

    def set_extra_state(self, state):
        if state["size"] != 3:
            raise KeyError("no such size")

    def forward(self, x):
        return x


def sparse(state):
    state["model"]["0.fc3.weight"] = state["model"]["0.fc3.weight"].to_sparse()


def not_a_tensor(state):
    class Shaped:
        shape = state["model"]["0.fc3.weight"].shape

    state["model"]["0.fc3.weight"] = Shaped()


def foreign(state):
    state["model"]["1._extra_state"] = {"size": 4}


def without_structure(state):
    del state["model"]["0.fc3._extra_state"]


def structure_of_another_step(state):
    state["model"]["0.fc3._extra_state"] = at_step(3, made()).state_dict()["model"]["0.fc3._extra_state"]


def damaged_structure(state):
    state["model"]["0.fc3._extra_state"] = torch.zeros(9)


def made():
    return sgfx.Pruner(nn.Sequential(lenet(), Stubborn()), groups=4, ratio=0.6, step=0.2)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (sparse, r"0\.fc3\.weight"),
        (not_a_tensor, r"0\.fc3\.weight"),
        (foreign, "no such size"),
        (without_structure, r"Missing key.*0\.fc3\._extra_state"),
        (structure_of_another_step, r"0\.fc3\.mask differs"),
        (damaged_structure, r"0\.fc3\._extra_state can't be read"),
    ],
)
def test_a_state_that_fails_half_way_changes_nothing(damage, message, step):
    state = copy.deepcopy(at_step(1, made()).state_dict())
    damage(state)
    each = at_step(step, made()) if step else made()
    before = everything(each)
    with pytest.raises(
        sgfx.InputError, match=rf"(?s)the state's model can't be loaded, and nothing was cha.*{message}"
    ):
        each.load_state_dict(state)
    assert_same(each, before)
    assert [s.index for s in each] == list(range(max(step, 1), 4))


def test_states_of_earlier_versions_whose_masks_were_buffers_are_read():
    saved = at_step(2)
    state = saved.state_dict()
    values = {name: value for name, value in state["model"].items() if "_extra" not in name}
    values |= {f"{path}.mask": mask for path, mask in masks(saved.model).items()}
    for each in (pruner(), at_step(3)):
        each.load_state_dict(state | {"model": values})
        assert_same(each, everything(saved))
    other = values | {"fc1.mask": ~values["fc1.mask"]}
    each = at_step(1)
    before = everything(each)
    with pytest.raises(sgfx.InputError, match=r"fc1\.mask differs"):
        each.load_state_dict(state | {"model": other})
    assert_same(each, before)


def test_what_is_pruned_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        state = at_step(1).state_dict()
        each = pruner()
        each.load_state_dict(state)
        steps = [step.index for step in each]
        small = each.lower()
    assert steps[0] == 1
    small(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_model_compiled_by_torch_goes_on_across_steps_and_is_compiled_once_more_when_lowered():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    pruner = sgfx.Pruner(model, groups=2, ratio=0.5, step=0.25)
    counter = CompileCounter()
    torch._dynamo.reset()
    fast, x, counts = torch.compile(pruner.model, backend=counter), torch.randn(2, 3, 8, 8), []
    for _ in pruner:
        torch.testing.assert_close(fast(x), pruner.model(x))
        counts.append(counter.frame_count)
    small = pruner.lower()
    torch.testing.assert_close(fast(x), small(x))
    assert [*counts, counter.frame_count] == [1, 1, 2]
