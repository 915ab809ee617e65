"""Constant channels in the biases of their readers: by hand, and against the model as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.freezing.choosing.recipe import LibraryLayer, Recipe
from passes.freezing.rewrites.constants import FoldConstants, absorbed, constant_filters, pads_with_zeros
from passes.freezing.rewrites.rewrite import PART, SHAPES
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.layers.grouped import GROUPED
from passes.layers.plan import LayerPlan, attach_plan
from passes.pipeline import REWRITES
from passes.tracing.regions import find_regions
from passes.tracing.shapes import find_shapes
from passes.tracing.trace import Region


def grouped(layer, labels, keep):
    """A layer regrouped by hand: `keep[g]` lists the inputs of group g."""
    filters, inputs = layer.weight.shape[:2]
    mask = torch.zeros(len(keep), inputs, dtype=torch.bool)
    for group, reads in enumerate(keep):
        mask[group, reads] = True
    kind, kernel = type(layer).__name__, tuple(layer.weight.shape[2:])
    plan = LayerPlan(kind, inputs, filters, kernel, torch.tensor(labels), mask, requested_ratio=0.5)
    new = GROUPED[type(layer)].from_dense(layer, plan)
    attach_plan(new, plan)
    return new


def fused(model, x):
    """The fused graph of a model, and how many constants were folded."""
    (region,) = find_regions(model.eval(), (x,)).parts
    assert isinstance(region, Region)
    graph = region.graphs["eval"]
    assert find_shapes(graph, (x,))
    before = [each for each in REWRITES if each.name in ("make recipes", "fold norms", "fuse sums", "fuse activations")]
    compilation = run_passes([REWRITES[0], *before], Compilation(graph, {PART: "", SHAPES: (x,)}))
    there = filters(graph)
    run_passes([FoldConstants()], compilation)
    return graph, there - filters(graph)


def filters(graph):
    return sum(len(module.weight()) for module in graph.modules() if isinstance(module, Recipe))


@torch.no_grad()
def run(graph, x):
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Recipe):
            graph.set_submodule(node.target, LibraryLayer(module))
    return graph(x)


def layers_of(graph):
    return {module.path: module.layer for module in graph.modules() if isinstance(module, Recipe)}


class Two(nn.Module):
    """Two layers with something in between."""

    def __init__(self, first, second, norm=None, act=None):
        super().__init__()
        self.first, self.second = first, second
        self.norm, self.act = norm or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.second(self.act(self.norm(self.first(x))))


def test_numbers_by_hand():
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]]))
        first.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
        second.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, -2.0, 1.0]]))
        second.bias.copy_(torch.tensor([0.5, 0.25]))
    first = grouped(first, [0, 1, 0], [[0, 1], []])
    assert constant_filters(first).tolist() == [1]
    x = torch.tensor([[1.0, -1.0]])
    graph, count = fused(Two(first, second), x)
    assert count == 1
    recipes = {module.path: module for module in graph.modules() if isinstance(module, Recipe)}
    assert recipes["second"].layer.weight.tolist() == [[1.0, 3.0], [4.0, 1.0]]
    assert recipes["second"].weight_and_bias()[1].tolist() == [0.5 + 2 * 5, 0.25 - 2 * 5]
    # first: [1·1 − 1·2, 5, 3 − 4 + 1] = [−1, 5, 0]; second: [−1 + 10 + 0 + 0.5, −4 − 10 + 0 + 0.25]
    assert run(graph, x).tolist() == [[9.5, -13.75]]
    assert absorbed(torch.ones(2, 3, 2, 2), torch.tensor([0, 2]), torch.tensor([1.0, 3.0]).double()).tolist() == [
        16,
        16,
    ]


READERS = {
    "no padding": ({"kernel_size": 3}, True),
    "1×1": ({"kernel_size": 1}, True),
    "strided": ({"kernel_size": 3, "stride": 2, "dilation": 2}, True),
    "valid": ({"kernel_size": 3, "padding": "valid"}, True),
    "same, 1×1": ({"kernel_size": 1, "padding": "same"}, True),
    "reflect": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, True),
    "circular": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, True),
    "zeros": ({"kernel_size": 3, "padding": 1}, False),
    "same": ({"kernel_size": 3, "padding": "same"}, False),
    "zeros at one side": ({"kernel_size": (3, 1), "padding": (1, 0)}, False),
}


@pytest.mark.parametrize("regrouped", [False, True])
@pytest.mark.parametrize("shift", [1.5, -1.5], ids=["positive", "cut off by ReLU"])
@pytest.mark.parametrize("reader", READERS)
def test_zero_padding_allows_zeros_alone(reader, shift, regrouped):
    torch.manual_seed(0)
    options, exact = READERS[reader]
    first = grouped(nn.Conv2d(3, 6, 3, bias=False).double(), [0, 1, 0, 2, 1, 0], [[0, 1], [], [2]])
    second = nn.Conv2d(6, 4, **options).double()
    second = grouped(second, [0, 1, 0, 1], [[0, 1, 4], [1, 3, 5]]) if regrouped else second
    norm = nn.BatchNorm2d(6).double()
    nn.init.constant_(norm.bias, shift)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model, x = Two(first, second, norm, nn.ReLU()).eval(), torch.randn(2, 3, 12, 12).double()
    expected = model(x).detach()
    graph, count = fused(model, x)
    assert count == (2 if exact or shift < 0 else 0)
    assert layers_of(graph)["first"].out_channels == 6 - count == layers_of(graph)["second"].in_channels
    assert (run(graph, x) - expected).abs().max() < 1e-12


def test_a_layer_that_read_constants_alone_is_constant_in_its_turn():
    torch.manual_seed(0)
    first = grouped(nn.Linear(3, 4).double(), [0, 1, 0, 1], [[0, 1, 2], []])
    second = grouped(nn.Linear(4, 4).double(), [0, 1, 1, 0], [[0, 2], [1, 3]])
    model, x = Two(first, nn.Sequential(nn.ReLU(), second, nn.Linear(4, 2).double())), torch.randn(5, 3).double()
    expected = model(x).detach()
    graph, count = fused(model, x)
    assert count == 4
    assert (run(graph, x) - expected).abs().max() < 1e-12
    first, second = (grouped(nn.Linear(4, 4).double(), [0, 1, 1, 0], [[0, 2], []]) for _ in range(2))
    second = grouped(nn.Linear(4, 4).double(), [0, 0, 1, 1], [[1, 2], [1]])  # it reads nothing but constants
    model, x = Two(first, second), torch.randn(5, 4).double()
    expected = model(x).detach()
    graph, count = fused(model, x)
    assert count == 0
    assert (run(graph, x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("other", ["residual", "depthwise", "output", "pool", "read twice"])
def test_other_readers_leave_constants_where_they_are(other):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = grouped(nn.Conv2d(3, 4, 1), [0, 1, 0, 1], [[0, 1, 2], []])
            self.second, self.third = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            if other == "residual":
                return self.third(y) + x
            if other == "read twice":
                return y + x
            return y, {"depthwise": self.depthwise, "output": torch.neg, "pool": lambda x: F.avg_pool2d(x, 2)}[other](x)

    torch.manual_seed(0)
    graph, count = fused(Model(), torch.randn(1, 3, 6, 6))
    assert count == 0
    assert layers_of(graph)["first"].out_channels == 4


def test_layers_over_other_dimensions_are_no_readers():
    """A linear layer behind a convolution reads the pixels of a row, not channels."""
    torch.manual_seed(0)
    first = grouped(nn.Conv2d(3, 5, 1), [0, 1, 0, 1, 1], [[0, 1, 2], []])
    model, x = Two(first, nn.Linear(5, 2)), torch.randn(1, 3, 5, 5)
    expected = model(x).detach()
    graph, count = fused(model, x)
    assert count == 0
    assert (run(graph, x) - expected).abs().max() < 1e-5


def test_padding_by_its_words():
    assert pads_with_zeros(nn.Conv2d(1, 1, 3, padding=(0, 1)))
    assert not pads_with_zeros(nn.Conv2d(1, 1, 3))


@pytest.mark.parametrize("strategy", ["library", None])
def test_a_frozen_model_without_its_constants(strategy):
    torch.manual_seed(0)
    first = grouped(nn.Conv2d(3, 8, 3, padding=1), [0, 1, 0, 2, 1, 0, 2, 0], [[0, 1], [], [2]])
    second = grouped(nn.Conv2d(8, 8, 1), [0, 0, 1, 1, 2, 2, 3, 3], [[0, 1, 4], [2, 3, 4], [5, 1], [6, 7]])
    model, x = Two(first, nn.Sequential(second, nn.ReLU(), nn.Conv2d(8, 4, 3))), torch.randn(2, 3, 9, 9)
    frozen = sgfx.freeze(model, x, strategy=strategy)
    with torch.no_grad():
        assert (frozen(x) - model(x)).abs().max() < 1e-5
    assert frozen.decisions.layers["first"].macs == 2 * 81 * 9 * (4 * 2 + 2 * 1)
    assert sum(sgfx.plans(model)["first"].labels == 1) == 2
    assert model.first.out_channels == 8
