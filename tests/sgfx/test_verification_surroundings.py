"""`sgfx.verify` compares gradients whatever the caller records of its own."""

import copy

import pytest
import torch
from torch import nn

import sgfx


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_where_none_are_recorded(mode):
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).double()
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    wrong = copy.deepcopy(small)
    wrong[0].weight.register_hook(lambda gradient: 2 * gradient)
    with mode():
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        found, other = sgfx.verify(dense, small, images), sgfx.verify(dense, wrong, images)
    assert found.max_error < 1e-12
    assert found.gradient_error < 1e-12
    assert other.gradient_error is not None
    assert not torch.is_inference_mode_enabled()
