"""Models that change tensors in place, or whose shapes agree only at the example: frozen, they compute the same."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sgfx
from passes.kernel import supported
from passes.mutation import works_in_place
from passes.trace import trace
from tests.sgfx.test_freeze import error, trained

STRATEGIES = ["library"] + ["kernel"] * (supported() is None)
IMAGES = torch.randn(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Some layers, of which each model below uses a few."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.three, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.two, self.last = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(20, 4, 1)
        self.position = nn.Parameter(torch.randn(1, 8, 8, 9))


class ShortcutBeforeActivation(Parts):
    """The shortcut's layer reads x before it is changed; the sum comes after that."""

    def forward(self, x):
        x = self.stem(x)
        shortcut, y = self.one(x), self.three(self.act(x))
        return y * torch.sigmoid(y) + shortcut


class NormBeforeChange(Parts):
    """A norm and a ReLU that could move into the layer behind them, had x not been changed in between."""

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.norm(x))
        x.add_(1)
        return self.one(y) + torch.tanh(x)


class GrowingPartChanged(Parts):
    """Two concatenations, the second the longer, and a part that is changed between them."""

    def forward(self, x):
        a, b = self.stem(x), torch.tanh(self.stem(x))
        y = self.two(torch.cat([a, b], 1))
        F.relu(a, inplace=True)
        return self.last(torch.cat([a, b, y], 1))


class AnotherName(Parts):
    """`x += y` is seen by whoever holds x."""

    def forward(self, x):
        x = self.stem(x)
        other = x
        x += self.one(x)
        x *= 2
        x -= 1
        x /= 3
        return torch.sigmoid(other)


class Position(Parts):
    """What is added has the shape of a batch of one, and is spread over a larger one."""

    def forward(self, x):
        return self.one(self.stem(x)) + self.position


class TwoReaders(Parts):
    """Two layers read a concatenation that grows; what they yield goes through what no kernel computes."""

    def forward(self, x):
        x = self.stem(x)
        joined = torch.cat([x, torch.sigmoid(self.one(x))], 1)
        y, z = torch.tanh(self.two(joined)), torch.tanh(self.two(joined + 1))
        more = torch.cat([joined, y], 1)
        return self.last(more) + torch.tanh(self.two(joined)) + z


class BothRead(nn.Module):
    """Two layers in a row read the same growing concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        joined = torch.cat([x, torch.sigmoid(self.one(x))], 1)
        left, right = self.left(joined), self.right(joined)
        return self.last(torch.cat([joined, torch.tanh(left), torch.tanh(right)], 1))


MODELS = [
    ShortcutBeforeActivation, NormBeforeChange, GrowingPartChanged, AnotherName, Position, TwoReaders, BothRead,
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", MODELS)
def test_frozen_models_compute_the_same(kind, strategy):
    torch.manual_seed(1)
    model = trained(kind())
    frozen = sgfx.freeze(model, IMAGES, strategy=strategy)
    for batch in (1, 2, 5):
        assert error(frozen, model, torch.randn(batch, 3, 8, 9)) < 1e-5


@pytest.mark.parametrize("length", [7, 12])
def test_a_norm_over_positions_is_not_folded_into_a_linear_layer(length):
    """BatchNorm1d normalises dimension 1, a linear layer's filters are in the last."""
    model = trained(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(length)))
    x = torch.randn(3, length, 5)
    assert error(sgfx.freeze(model, x, strategy="library"), model, x) < 1e-5


def test_what_works_in_place():
    graph = fx.Graph()
    x = graph.placeholder("x")
    changing = [
        graph.call_function(operator.iadd, (x, 1)),
        graph.call_function(operator.setitem, (x, 0, 1)),
        graph.call_method("add_", (x, 1)),
        graph.call_function(F.relu, (x,), {"inplace": True}),
        graph.call_function(F.hardtanh, (x, 0.0, 6.0, True)),
        graph.call_function(torch.add, (x, x), {"out": x}),
        graph.call_module("act", (x,)),
    ]
    leaving = [
        graph.call_function(operator.add, (x, 1)),
        graph.call_method("__len__", (x,)),
        graph.call_function(F.relu, (x, False)),
        graph.call_module("other", (x,)),
    ]
    module = fx.GraphModule({"act": nn.ReLU(inplace=True), "other": nn.ReLU()}, graph)
    assert all(works_in_place(module, node) for node in changing)
    assert not any(works_in_place(module, node) for node in leaving)


def test_augmented_assignments_are_traced_as_such():
    graph = trace(AnotherName().eval()).graphs["eval"].graph
    found = [node.target for node in graph.nodes if node.op == "call_function"]
    assert found == [operator.iadd, operator.imul, operator.isub, operator.itruediv, torch.sigmoid]
