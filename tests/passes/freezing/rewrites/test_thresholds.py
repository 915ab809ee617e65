"""Norms and activations as comparisons: by hand, and against the model as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sgfx
from passes.freezing.choosing.recipe import FusedNorm, LibraryLayer
from passes.freezing.rewrites.thresholds import HIGHEST, thresholds

numbers = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, -0.0, 1e-35, -1e-35, 1e-29, 1e-8]))


@given(numbers, st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.sampled_from(sorted(HIGHEST)))
def test_the_algebra(scale, shift, x, name):
    column = torch.tensor([[scale], [shift]], dtype=torch.float64)
    low, high, s, t = (float(each) for each in thresholds(*column, HIGHEST[name]))
    expected = min(max(scale * x + shift, 0.0), HIGHEST[name])
    got = s * min(max(x, low), high) + t
    assert abs(got - expected) <= 1e-13 * max(abs(shift), abs(scale * x), 1e-12, HIGHEST["relu6"])


def test_numbers_by_hand():
    scale, shift = torch.tensor([2.0, -2.0, 0.0, 0.0]).double(), torch.tensor([3.0, 3.0, 4.0, -4.0]).double()
    low, high, s, t = thresholds(scale, shift, torch.inf)
    assert low.tolist() == [-1.5, -torch.inf, -torch.inf, -torch.inf]
    assert high.tolist() == [torch.inf, 1.5, torch.inf, torch.inf]
    assert s.tolist() == [2.0, -2.0, 0.0, 0.0]
    assert t.tolist() == [3.0, 3.0, 4.0, 0.0]
    assert [each.tolist() for each in thresholds(scale[:2], shift[:2], 6.0)[:2]] == [[-1.5, -1.5], [1.5, 1.5]]


class Model(nn.Module):
    """A norm and an activation, and what reads them."""

    def __init__(self, act, *readers):
        super().__init__()
        self.norm, self.act, self.readers = nn.BatchNorm2d(6), act, nn.ModuleList(readers)

    def forward(self, x):
        x = self.act(self.norm(x))
        return [reader(x) for reader in self.readers]


def model_of(act, *readers):
    torch.manual_seed(0)
    model = Model(act, *readers).eval().double()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 1e-12, 2.0, -3.0]))
        model.norm.bias.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0, -1.0, 1.0]))
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


def frozen_with(model, **options):
    x = 3 * torch.randn(3, 6, 7, 7, generator=torch.Generator().manual_seed(1)).double()
    frozen = sgfx.freeze(model, x, strategy="library", **options)
    with torch.no_grad():
        for each, expected in zip(frozen(x), model(x), strict=True):
            assert (each - expected).abs().max() < 1e-12
    layers = [module for module in frozen.modules() if isinstance(module, LibraryLayer)]
    norms = [module for module in frozen.modules() if isinstance(module, FusedNorm)]
    return sum(layer.ends is not None for layer in layers), len(norms)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
@pytest.mark.parametrize("regrouped", [False, True])
def test_readers_without_padding_take_scale_and_shift(act, regrouped):
    model = model_of(act, nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, stride=2, bias=False))
    if regrouped:
        model = sgfx.compile(model, groups=2, ratio=0.4, overrides={"readers.0": {"groups": 2}})
    assert frozen_with(model) == (2, 0)


@pytest.mark.parametrize(
    ("act", "reader"),
    [
        (nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)),
        (nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6)),
        (nn.ReLU(), nn.Identity()),
        (nn.ReLU(), nn.Linear(7, 2)),
        (nn.SiLU(), nn.Conv2d(6, 4, 1)),
    ],
    ids=["padding", "depthwise", "output", "linear over pixels", "silu"],
)
def test_other_readers_see_the_norm_itself(act, reader):
    assert frozen_with(model_of(act, nn.Conv2d(6, 4, 1), reader)) == (0, 1)


def test_a_reflected_border_is_no_padding_with_zeros():
    assert frozen_with(model_of(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"))) == (1, 0)


def test_a_shift_that_rounding_would_show_stays_in_the_norm():
    model = model_of(nn.ReLU(), nn.Conv2d(6, 4, 1))
    nn.init.constant_(model.norm.bias, -1e5)
    assert frozen_with(model) == (0, 1)
