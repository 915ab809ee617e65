"""Models that change tensors in place, or whose shapes agree only at the example: frozen, they compute the same."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sgfx
from passes.kernel import supported
from passes.tracing.mutation import works_in_place
from passes.tracing.trace import trace
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


class SumInAView(Parts):
    """The sum works in place on a view of what is read later."""

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        y = x[:]
        y += self.one(x)
        return self.three(x) + y


MODELS = [
    ShortcutBeforeActivation, NormBeforeChange, GrowingPartChanged, AnotherName, Position, TwoReaders, BothRead,
    SumInAView,
]  # fmt: skip


def halved(x):
    """Works in place, which its name does not say."""
    x.data.mul_(0.5)


def halved_in_lists(x):
    torch._foreach_mul_([x.detach()], 0.5)


def normed(x, mean, var):
    """A norm in train mode, which writes to its statistics."""
    return F.batch_norm(x, mean, var, training=True, momentum=0.5)


def assigned(x):
    x[:, 0] = 0.5


def replaced(x):
    x.data = torch.tanh(x)


torch.fx.wrap("halved")
torch.fx.wrap("halved_in_lists")
torch.fx.wrap("normed")
torch.fx.wrap("assigned")
torch.fx.wrap("replaced")


class Halving(nn.ReLU):
    """A leaf that works in place and has no `inplace`."""

    def forward(self, x):
        return x.mul_(0.5)


def halving():
    module = nn.Identity()
    module.forward = lambda x: x.mul_(0.5)
    return module


@torch.library.custom_op("sgfx_tests::halve", mutates_args=("x",))
def halve(x: torch.Tensor) -> None:
    x.mul_(0.5)


@halve.register_fake
def _(x):
    return None


CHANGES = {
    "user's function": lambda self, x: halved(x),
    "user's function over lists": lambda self, x: halved_in_lists(x),
    "memory replaced": lambda self, x: replaced(x),
    "custom operation": lambda self, x: torch.ops.sgfx_tests.halve(x),
    "foreach": lambda self, x: torch._foreach_mul_([x], 0.5),
    "out": lambda self, x: torch.mul(x, 0.5, out=x),
    "data": lambda self, x: x.data.mul_(0.5),
    "view": lambda self, x: x[:, 2:].flatten(2).detach().mul_(0.5),
    "assignment": lambda self, x: assigned(x),
    "patched module": lambda self, x: self.halving(x),
}


class Changed(Parts):
    """Layers whose turn comes before a change of their input, and which are summed or read after it."""

    def __init__(self, change):
        super().__init__()
        self.change, self.halving = change, halving()

    def forward(self, x):
        x = self.stem(x)
        shortcut, y = self.one(x), F.relu(self.norm(x))
        self.change(self, x)
        z = self.one(y) + self.three(x)
        return z + shortcut + torch.tanh(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_tensor_is_seen_whatever_it_is_called(name, strategy):
    torch.manual_seed(1)
    model = trained(Changed(CHANGES[name]))
    small = sgfx.compile(model, groups=3, ratio=0.5, example_inputs=IMAGES, calibration=torch.randn(20, 3, 8, 9))
    for each in (model, small):
        frozen = sgfx.freeze(each, IMAGES, strategy=strategy)
        assert error(frozen, each, torch.randn(2, 3, 8, 9)) < 1e-5


@pytest.mark.parametrize("name", CHANGES)
def test_elimination_knows_what_changes_a_tensor(name):
    torch.manual_seed(1)
    model = trained(Changed(CHANGES[name])).double()
    options = {"groups": 3, "ratio": 0.9, "example_inputs": IMAGES.double()}
    whole, fewer = sgfx.compile(model, **options), sgfx.compile(model, eliminate=True, **options)
    assert error(fewer, whole, torch.randn(2, 3, 8, 9).double()) < 1e-12


def written(model, *inputs):
    graph = trace(model, inputs).graphs["eval"]
    return [node.name for node in graph.graph.nodes if works_in_place(graph, node)]


def test_what_is_written_to_is_noted_with_shapes():
    x = torch.zeros(2, 3, 4, 4)
    assert written(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()).train(), x) == []
    assert written(nn.Sequential(nn.ReLU(inplace=True), nn.Hardswish(inplace=True)), x) == ["_0", "_1"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            y = normed(x, self.mean, self.var)
            y.clamp_(0, 1)
            return F.batch_norm(y, self.mean, self.var) + torch.relu(x)

    assert written(Net(), x) == ["normed", "clamp_"]


def test_without_shapes_a_users_own_may_change_what_it_reads():
    graph = fx.Graph()
    x = graph.placeholder("x")
    known = [graph.call_function(torch.sigmoid, (x,)), graph.call_function(operator.getitem, (x, 0)), x]
    foreign = [graph.call_function(halved, (x,)), graph.call_module("own", (x,)), graph.call_module("patched", (x,))]
    module = fx.GraphModule({"own": Halving(), "patched": halving()}, graph)
    assert all(works_in_place(module, node) for node in foreign)
    assert not any(works_in_place(module, node) for node in known)


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
