"""Models that do unusual things: each is compiled exactly, or left alone where it does them, with the reason."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from benchmarks.fuzz import examine
from tests.tools.oracle import prepare
from tests.tools.random_models import flip_inputs, halve_channels

X = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Parent(nn.Module):
    """Registers a child that registers its parent."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1))
        self.inner.append(nn.Identity())
        self.inner[2].parent = self

    def forward(self, x):
        return self.inner(x)


class Loose(nn.Module):
    """Keeps its parent in a tuple, and calls a layer of it."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(8, 8, 1)
        self.first, self.second = Part(self, 4), Part(self, 8)

    def forward(self, x):
        return self.second(self.first(x))


class Part(nn.Module):
    def __init__(self, parent, channels):
        super().__init__()
        self.parent = (parent,)
        self.conv = nn.Conv2d(channels, 8, 1)

    def forward(self, x):
        return self.parent[0].shared(self.conv(x))


class Several(nn.Module):
    """Calls one module on tensors of different sizes, and of different rank."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x)
        first, second = self.shared(x), self.shared(F.avg_pool2d(self.shared(x), 2))
        pooled = self.dense(first.mean((2, 3)))
        return pooled + self.dense(second.flatten(2).transpose(1, 2)).sum(1)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = self.norm(self.b(x))
        y += x
        y[:, 2:5] *= 2
        z = self.c(self.act(y))
        z[:, :4].mul_(3)
        z.add_(y)
        return z


class Functional(nn.Module):
    """Uses weights in functions: in both modes, and in train mode alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4 if i == 0 else 8, 8, 1) for i in range(4))

    def forward(self, x):
        x = F.conv2d(self.b(self.a(x)), self.b.weight, self.c.bias)
        if self.training:
            x = x + self.c.weight.sum()
        return self.d(self.c(x))


class Dynamic(nn.Module):
    """Control flow that depends on the data, around a part that can be traced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(1 + int(x.mean() < 1e9)):
            x = self.block(x)
        return self.head(x.mean((2, 3)))


class Selective(nn.Module):
    """Calls a block with those examples that are good enough: in eval mode none is."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        x = self.stem(x)
        chosen = x if self.training else x[x.mean((1, 2, 3)) > 1e9]
        return x, self.block(chosen[: len(chosen)] if bool((x < 1e9).all()) else x)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0])


class Hooked(nn.Module):
    """A hook halves the channels of one layer, another one flips what a layer is given."""

    def __init__(self, wrong=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)
        self.c, self.d = nn.Conv2d(8 if wrong else 4, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.register_forward_hook(halve_channels)
        self.d.register_forward_pre_hook(flip_inputs)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


class HookedBlock(Hooked):
    """The same in a part of a model that can't be traced whole."""

    def forward(self, x):
        return super().forward(x) if bool(x.sum() < 1e9) else x


def ready(kind, **options):
    torch.manual_seed(0)
    return prepare(kind(**options).double())


@pytest.mark.parametrize(
    "model",
    [
        ready(Loose),
        ready(Several),
        ready(InPlace),
        ready(Functional),
        ready(Dynamic),
        ready(Selective),
        ready(Attending),
        ready(Hooked),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("eliminate", [False, True])
def test_unusual_models_are_compiled_exactly(model, ratio, eliminate):
    assert examine(copy.deepcopy(model), X, 2, ratio, eliminate).startswith("exact")


def reasons(model, **options):
    return {path: plan.reason for path, plan in sgfx.plans(sgfx.compile(model, ratio=0.5, **options)).items()}


def test_modules_that_hold_each_other():
    model = Parent()
    with pytest.raises(
        sgfx.InputError, match=r"'inner\.2\.parent' is a module that holds it itself, so that torch's own"
    ):
        sgfx.compile(model, ratio=0.5)
    assert sgfx.plans(model) == {}
    assert reasons(ready(Loose)) == {"first.conv": "first convolution", "second.conv": None, "shared": None}


def test_layers_whose_weights_functions_use_are_left_alone():
    found = reasons(ready(Functional))
    assert found["b"] == "its weight is read by an operation outside its own call"
    assert found["c"] == "its weight is read by an operation outside its own call"
    assert found["d"] is None


def test_layers_around_control_flow_on_data_are_regrouped_where_a_run_shows_how_they_are_used():
    assert reasons(ready(Dynamic), example_inputs=X) == {"stem": "first convolution"} | dict.fromkeys(
        ("block.0", "block.3", "head")
    )
    found = reasons(ready(Dynamic))
    assert (found["block.0"], found["block.3"]) == ("first convolution", None)
    assert "outside every part that can be traced" in found["head"]


def test_attention_is_left_alone():
    found = reasons(ready(Attending))
    assert found["attention.out_proj"] == "inside 'attention', and MultiheadAttention reads its parameters itself"
    assert found["head"] is None


def test_hooks_may_change_shapes_but_example_inputs_must_fit_a_model_without():
    assert reasons(ready(Hooked), example_inputs=X) == {"a": "first convolution"} | dict.fromkeys("bcd")
    with pytest.raises(sgfx.InputError, match="do not fit the model at layer '0'"):
        sgfx.compile(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).double(), ratio=0.5, example_inputs=X)


def test_hooks_that_change_shapes_in_a_model_that_can_not_be_traced():
    with pytest.raises(
        sgfx.InputError, match=r"'d': outside every part .*, and running the example inputs in eval mode"
    ):
        sgfx.compile(ready(HookedBlock), ratio=0.5, example_inputs=X)
