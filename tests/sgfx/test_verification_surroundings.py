"""`sgfx.verify` compares gradients whatever the caller records of its own, and says where there can be none."""

import copy

import pytest
import torch
from torch import nn

import sgfx


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_where_none_are_recorded(mode):
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).double()
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    other = copy.deepcopy(small)
    other[0].requires_grad_(False)
    with mode():
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        found, wrong = sgfx.verify(dense, small, images), sgfx.verify(dense, other, images)
    assert found.max_error < 1e-12
    assert found.gradient_error < 1e-12
    assert wrong.gradient_error == float("inf")
    assert not torch.is_inference_mode_enabled()


class Spectrum(nn.Sequential):
    """Gives complex numbers."""

    def forward(self, x):
        return torch.fft.fft2(super().forward(x))


class Spoilt(nn.Sequential):
    """Changes in place what its gradient needs."""

    def forward(self, x):
        return super().forward(x).sigmoid().mul_(2).tanh().mul_(2)


def test_complex_outputs_have_gradients():
    dense = Spectrum(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found = sgfx.verify(dense, small, images)
    assert found.gradient_error is not None
    assert max(found.gradient_error, found.max_error) < 1e-12
    small[2].requires_grad_(False)
    assert sgfx.verify(dense, small, images).gradient_error == float("inf")


def test_a_model_that_cant_be_trained_is_told():
    dense = Spoilt(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(sgfx.InputError, match=r"Spoilt can't be trained, so its gradients .*inplace"):
        sgfx.verify(dense, small, images)
    found = sgfx.verify(dense.requires_grad_(False), small.requires_grad_(False), images)
    assert found.gradient_error is None
    assert found.max_error < 1e-12
