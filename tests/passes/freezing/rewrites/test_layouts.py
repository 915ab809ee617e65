"""Layouts: frozen with the channels last in memory, models that look at memory compute the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Some layers, of which each model below uses a few."""

    def __init__(self):
        super().__init__()
        self.stem, self.two, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.head, self.act = nn.Linear(128, 10), nn.ReLU()


class LeNet(Parts):
    """As it is in many tutorials."""

    def forward(self, x):
        return self.head(self.pool(F.relu(self.two(F.relu(self.stem(x))))).view(-1, 128))


class Complex(Parts):
    """Neighbours in a row are the parts of complex numbers."""

    def forward(self, x):
        return self.two(torch.view_as_complex(self.stem(x).view(2, 8, 8, 4, 2)).abs().repeat(1, 1, 1, 2))


class WrittenThroughReshape(Parts):
    """What is written to is the layer's result, since it can be reshaped without a copy."""

    def forward(self, x):
        y = self.stem(x)
        y.reshape(2, -1).mul_(2)
        return self.two(torch.tanh(y))


class WrittenThroughFlatten(Parts):
    """The same by a module, behind an activation that passes the layout on."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()

    def forward(self, x):
        y = torch.tanh(self.stem(x))
        self.flatten(y).mul_(2)
        return self.two(y)


class CopiedByReshape(Parts):
    """What is written to is a copy, which would be a view with the channels last."""

    def forward(self, x):
        y = self.stem(x)
        z = y.permute(0, 2, 3, 1).reshape(2, -1)
        z.mul_(2)
        return self.two(y) + z.sum()


class Asking(Parts):
    """Branches on the layout."""

    def forward(self, x):
        y = self.stem(x)
        return self.two(y) * y.stride(1)


MODELS = [LeNet, Complex, WrittenThroughReshape, WrittenThroughFlatten, CopiedByReshape, Asking]


def channels_last(model):
    """Freeze a model with all layers computed with the channels last, as a stopwatch may have it."""
    decisions = sgfx.freeze(model, IMAGES).decisions.to_dict()
    for layer in decisions["layers"].values():
        layer.update(way="channels_last", tiling=[])
    return sgfx.freeze(model, IMAGES, decisions=decisions)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("grouped", [False, True])
def test_code_finds_tensors_as_they_lie_in_the_model(kind, grouped):
    torch.manual_seed(0)
    model = kind().eval()
    if grouped:
        model = sgfx.compile(model, groups=3, ratio=0.5)
    frozen = channels_last(copy.deepcopy(model))
    assert any(getattr(module, "channels_last", False) for module in frozen.modules())
    expected, found = model(IMAGES), frozen(IMAGES)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_lie_as_those_of_the_model(layout):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval().to(memory_format=layout)
    for frozen in (sgfx.freeze(copy.deepcopy(model), IMAGES), channels_last(model)):
        assert frozen(IMAGES).is_contiguous(memory_format=layout)


def test_layers_between_layers_choose_their_own_layout():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2)
    assert "contiguous" not in channels_last(nn.Sequential(*layers)).code
