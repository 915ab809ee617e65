"""Modules that compute something else than their class says: told apart, and left alone by every rewrite."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import sgfx
from passes.errors import InputError
from passes.freezing.choosing.recipe import FusedNorm
from passes.layers.grouped import GroupedConv2d
from passes.layers.known.as_torch_made_it import change_of, is_as_torch_made_it
from tests.passes.elimination.test_elimination import IMAGES, Chain, check_equal, compiled


def replaced(module, name="forward"):
    """As accelerate's hooks do it."""
    old = getattr(module, name)

    def new(module, *args, **kwargs):
        return module._old(*args, **kwargs).flip(1) * 1.5

    module._old = old
    setattr(module, name, functools.update_wrapper(functools.partial(new, module), old))
    return module


def of_another_class():
    module = nn.ReLU()
    module.__class__ = Clipped
    return module


def pruned(module):
    return prune.l1_unstructured(module, "weight", 0.5)


class Clipped(nn.ReLU):
    def forward(self, x):
        return x.clamp(0, 1)


@pytest.mark.parametrize(
    ("module", "change"),
    [
        (replaced(nn.ReLU()), "its forward was replaced on the instance"),
        (replaced(nn.Conv2d(4, 4, 1), "_conv_forward"), "its _conv_forward was replaced on the instance"),
        (replaced(nn.ReLU(), "_call_impl"), "its _call_impl was replaced on the instance"),
        (replaced(nn.Sequential()), "its forward was replaced on the instance"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is parametrized"),
        (pruned(nn.BatchNorm2d(8)), "its weight is computed"),
    ],
)
def test_what_was_changed_is_said(module, change):
    assert change in change_of(module)
    assert not is_as_torch_made_it(module)


def test_a_copy_is_changed_too():
    assert change_of(copy.deepcopy(replaced(nn.ReLU()))) == "its forward was replaced on the instance"


@pytest.mark.parametrize("module", [Clipped(), of_another_class(), Chain()])
def test_what_users_write_is_not_torchs_even_if_nothing_was_changed(module):
    assert change_of(module) is None
    assert not is_as_torch_made_it(module)


def test_modules_of_torch_and_of_this_package_are_known():
    used = nn.BatchNorm2d(4, eps=1e-2).eval()
    used.eps, used.of_the_user = 1e-3, "anything"
    used.register_forward_hook(lambda *_: None)
    fast = nn.Conv2d(4, 4, 1)
    fast.compile()
    layers = [used, fast, nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.Sequential(nn.ReLU())]
    assert all(map(is_as_torch_made_it, [*layers, GroupedConv2d(), FusedNorm(used, torch.float32)]))


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_patches_of_torchs_own_classes_are_seen(monkeypatch, name):
    monkeypatch.setattr(nn.ReLU, name, lambda self, x: x.flip(1))
    assert change_of(nn.ReLU()) == f"ReLU.{name} was replaced"
    assert change_of(nn.ReLU6()) is None


class Everything(nn.Module):
    """One module of each kind that freezing goes by, between two convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.act, self.drop = nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        self.same, self.pool, self.flat = nn.Identity(), nn.MaxPool2d(2), nn.Flatten()
        self.last = nn.Linear(128, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_()

    def forward(self, x):
        x = self.conv(self.stem(x))
        joined = torch.cat([x, self.pool(F.interpolate(self.drop(self.same(self.act(self.norm(x)))), scale_factor=2))])
        return self.last(self.flat(joined[:, :, ::2, ::2]))


PATCHED = ["stem", "conv", "norm", "act", "drop", "same", "pool"]


@pytest.mark.parametrize("strategy", ["library", None])
@pytest.mark.parametrize("name", PATCHED)
def test_freezing_leaves_changed_modules_alone(name, strategy):
    torch.manual_seed(0)
    model = Everything().eval()
    replaced(model.get_submodule(name))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        assert (sgfx.freeze(model, x, strategy=strategy)(x) - expected).abs().max() < 1e-5


def test_freezing_leaves_dropout_and_norms_alone_that_stay_in_train_mode():
    model = Everything().eval()
    for module in (model.drop, model.norm):
        module.training = True
        module.train = types.MethodType(lambda self, mode=True: self, module)
    x = torch.randn(2, 3, 8, 8)
    frozen = sgfx.freeze(model, x, strategy="library")
    kinds = [type(module) for module in frozen.modules()]
    assert nn.BatchNorm2d in kinds
    assert nn.Dropout in kinds


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.ReLU(), nn.MaxPool2d(1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=8)]
)
def test_elimination_leaves_changed_modules_alone(module):
    torch.manual_seed(0)
    model = Chain()
    model.between = replaced(module)
    dense, small = compiled(Between(model))
    assert len(small.a.weight) == 8
    check_equal(dense, small)


class Between(Chain):
    """A module between two convolutions, as a submodule."""

    def __init__(self, chain):
        super().__init__(between=chain.between)

    def forward(self, x):
        x = self.between(torch.relu(self.norm(self.a(x))))
        return self.c(torch.relu(self.b(x)))


class Depthwise(nn.Conv2d):
    """A depthwise convolution that mixes channels all the same."""

    def forward(self, x):
        return super().forward(x.flip(1))


def test_elimination_knows_what_subclasses_of_depthwise_convolutions_do():
    model = Chain()
    model.between = Depthwise(8, 8, 1, groups=8)
    dense, small = compiled(Between(model))
    assert len(small.a.weight) == len(small.between.weight) == 6  # a filter goes with the one that it is flipped with
    check_equal(dense, small)


def test_a_container_that_was_changed_is_no_region_of_its_own():
    """torch.fx traces the forward of a root's class."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))

        def forward(self, images):
            return torch.cat([self.body(image[None]) for image in images])

    torch.manual_seed(0)
    model = Loop().eval().double()
    replaced(model.body)
    small = sgfx.compile(model, groups=2, ratio=0.5, example_inputs=IMAGES, overrides={"body.2": {"ratio": 0.5}})
    with torch.no_grad():
        frozen = sgfx.freeze(small, IMAGES)
        assert (frozen(IMAGES) - small(IMAGES)).abs().max() < 1e-12


def test_a_regrouped_layer_that_was_changed_is_not_exported(tmp_path):
    small = sgfx.compile(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), groups=2, ratio=0.5)
    replaced(small[1])
    with pytest.raises(InputError, match=r"layer '1' can't be written to a file: its forward was replaced"):
        sgfx.export(small, tmp_path / "small.pt2", IMAGES.float())
