"""A pruner on a live model: what optimizers make of its new weights, and what state dicts do to it."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.errors import InputError
from sgfx.integrations.in_place import LivePruner
from sgfx.integrations.schedule import Moments, When

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 5, 9])
OPTIONS = {"groups": 4, "ratio": 0.6, "step": 0.2}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    ).double()


def live(steps):
    pruner = LivePruner(network(), **OPTIONS)
    for _ in range(steps):
        pruner.advance()
    return pruner


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()


OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.001, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_lowering_training_goes_on_as_if_masked(make):
    losses = []
    for lowered in (False, True):
        pruner = live(2)
        others = [p for p in pruner.model.parameters() if p.dim() < 2]
        weights = [p for p in pruner.model.parameters() if p.dim() > 1]
        optimizer = make([{"params": others, "lr": 0.02}, {"params": weights, "weight_decay": 0.01}])
        train(pruner.model, optimizer, 3)
        if lowered:
            pruner.lower_for([optimizer])
            assert optimizer.param_groups[1]["params"][1] is pruner.model[3].weight
            assert optimizer.param_groups[1]["weight_decay"] == 0.01
            assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
                id(p) for p in pruner.model.parameters()
            }
            assert set(optimizer.state) == set(pruner.model.parameters())
        train(pruner.model, optimizer, 5)
        losses.append(pruner.model.eval()(IMAGES).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)


def test_state_of_another_shape_starts_anew():
    pruner = live(1)
    optimizer = torch.optim.Adafactor(pruner.model.parameters(), lr=0.01)  # keeps sums over rows and columns
    train(pruner.model, optimizer, 2)
    pruner.lower_for([optimizer])
    assert pruner.model[3].weight not in optimizer.state
    assert pruner.model[0].weight in optimizer.state
    train(pruner.model, optimizer, 2)


def test_a_state_dict_takes_the_model_to_its_step():
    saved = []
    for steps in range(4):
        pruner = live(steps)
        saved.append(copy.deepcopy(pruner.model.state_dict()))
    pruner.lower_for([])
    saved.append(copy.deepcopy(pruner.model.state_dict()))
    for index, state in enumerate(saved):
        for before in {0, index - 1} & {0, 2}:
            other = live(before)
            other.model.load_state_dict(state)
            assert (other.index, other.lowered) == (min(index, 3), index == 4)
            assert other.model.state_dict().keys() == state.keys()
            assert all(torch.equal(value, state[name]) for name, value in other.model.state_dict().items())
    other = live(1)
    other.model.load_state_dict(saved[2])
    other.advance()
    reference = live(3)
    assert torch.equal(other.model[3].mask, reference.model[3].mask)


def test_what_does_not_belong_is_refused_and_nothing_is_changed():
    pruner, before = live(2), copy.deepcopy(live(2).model.state_dict())
    other = LivePruner(network(), **{**OPTIONS, "ratio": 0.7})
    for _ in range(len(other)):
        other.advance()
    lowered = live(3)
    lowered.lower_for([])
    narrow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for state, message in (
        (network().state_dict(), r"saved without PruningCallback, or in parts: there is no '3\._extra_state'"),
        (other.model.state_dict(), "another ratio, step or overrides"),
        ({**before, "3._extra_state": sgfx.compile(narrow, ratio=0.5).state_dict()["2._extra_state"]}, "layer '3'"),
    ):
        with pytest.raises(InputError, match=message):
            pruner.model.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())
    with pytest.raises(InputError, match="from before lowering, and the model is lowered"):
        lowered.model.load_state_dict(before)


def test_copies_of_the_model_load_by_themselves():
    pruner = live(1)
    later = copy.deepcopy(live(2).model.state_dict())
    with pytest.raises(RuntimeError, match="mask differs"):
        copy.deepcopy(pruner.model).load_state_dict(later)


def test_a_compiled_model_is_refused():
    with pytest.raises(InputError):
        LivePruner(sgfx.compile(network(), groups=4, ratio=0.5), **OPTIONS)
    with pytest.raises(InputError, match="_orig_mod"):
        LivePruner(torch.compile(network()), **OPTIONS)


def test_moments():
    assert When.of(4, None, None).moments(3) == Moments("epochs", (0, 4, 8), 8)
    assert When.of(None, 4, 20).moments(3) == Moments("steps", (0, 4, 8), 20)
    assert When.of([1, 2], None, None).moments(2) == Moments("epochs", (1, 2), 2)
    moments = Moments("steps", (0, 4, 8), 8)
    assert [moments.before(now) for now in (0, 3, 4, 9)] == [(0, 1), (1, 1), (1, 2), (3, 3)]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((None, None, None), InputError, "exactly one of every_epochs and every_steps"),
        ((1, 1, None), InputError, "exactly one of every_epochs and every_steps"),
        ((0, None, None), InputError, "every_epochs must be at least 1, not 0"),
        ((None, "12", None), TypeError, "every_steps must be an integer, not '12'"),
        ((True, None, None), TypeError, "every_epochs must be an integer, not True"),
        ((None, [], None), InputError, "ascending list of steps"),
        (([3, 3], None, None), InputError, "ascending list of epochs"),
        (([-1, 3], None, None), InputError, "every entry of every_epochs must be at least 0, not -1"),
        ((1, None, 1.5), TypeError, "lower_at must be an integer, not 1.5"),
    ],
)
def test_moments_that_are_none(given, error, message):
    with pytest.raises(error, match=message):
        When.of(*given)


def test_moments_that_do_not_fit_the_steps():
    with pytest.raises(InputError, match="lists 2 moments, and ratio and step make 3"):
        When.of([1, 2], None, None).moments(3)
    with pytest.raises(InputError, match="lower_at=7 comes before the last pruning step, at 8 epochs"):
        When.of(4, None, 7).moments(3)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_library_is_named_with_its_extra(name):
    program = f"import sys; sys.modules[{name!r}] = None\nimport sgfx\nsgfx.integrations\nsgfx.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    message = rf"ImportError: sgfx.integrations.{name} needs .*: pip install 'sgfx\[integrations\]'"
    assert re.search(message, done.stderr)


def test_importing_sgfx_imports_neither():
    program = "import sys, sgfx; sgfx.integrations, sgfx.Pruner; print({'lightning', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
