"""Norms that follow each other, or a sum, folded into the layer before them: against fp64."""

import pytest
import torch
from torch import nn

import sgfx
from passes.freezing.choosing.recipe import Recipe
from tests.sgfx.test_freeze import IMAGES, error, trained


@pytest.mark.parametrize("norms", [1, 2, 3])
def test_norms_that_follow_each_other(norms):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), *(nn.BatchNorm2d(8) for _ in range(norms)))).double()
    frozen = sgfx.freeze(model, IMAGES.double(), strategy="library")
    assert [type(module) for module in frozen.modules()].count(nn.BatchNorm2d) == 0
    assert error(frozen, model, IMAGES.double()) < 1e-14


def test_folding_by_hand():
    """y = 3·x + 1, a norm (scale 2, shift 5), and another (scale −4, shift 7): −4·(2·(3x + 1) + 5) + 7 = −24x − 21."""
    layer, first, second = nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0).eval(), nn.BatchNorm1d(1, eps=0.0).eval()
    with torch.no_grad():
        for module, scale, shift in ((layer, 3.0, 1.0), (first, 2.0, 5.0), (second, -4.0, 7.0)):
            module.weight.fill_(scale)
            module.bias.fill_(shift)
    recipe = Recipe(layer, "layer")
    recipe.fold(first)
    recipe.fold(second)
    weight, bias = recipe.weight_and_bias()
    assert (float(weight), float(bias)) == (-24.0, -21.0)
    recipe.add(torch.tensor([10.0], dtype=torch.float64))  # before the norms: −8 · 10 more
    assert float(recipe.weight_and_bias()[1]) == -101.0
