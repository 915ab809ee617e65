"""The list of rewrites: shapes are true after each, any may be left out, and what must come first is asked for."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sgfx
from passes.errors import PassError
from passes.freezing.choosing.choosing import Running
from passes.freezing.choosing.recipe import FusedNorm, Recipe
from passes.freezing.rewrites.rewrite import PART, SHAPES, UNFUSED, Rewrite, false_shape
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.pipeline import REWRITES
from passes.tracing.regions import find_regions
from passes.tracing.shapes import find_shapes

BY_NAME = {each.name: each for each in REWRITES}
OPTIONAL = [name for name in BY_NAME if name != "make recipes"]


class Mixed(nn.Module):
    """A residual block whose last layers have a group without inputs, then a dense block that grows."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10), nn.BatchNorm2d(14)])
        self.grow = nn.ModuleList([nn.Conv2d(6, 4, 1), nn.Conv2d(10, 4, 1)])
        self.drop, self.head = nn.Dropout(), nn.Linear(14, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.drop(self.conv2(F.relu(self.conv1(x))) + x))
        parts = [x]
        for norm, conv in zip(self.norms, self.grow, strict=False):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        x = F.relu(self.norms[2](torch.cat(parts, 1)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(params=[False, True], ids=["dense", "regrouped"])
def graph(request):
    """An eval graph with shapes, and what it is called with."""
    torch.manual_seed(0)
    model = Mixed().eval().double()
    for norm in [model.norm, *model.norms]:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
    if request.param:
        with torch.no_grad():
            model.conv1.weight[2:4] *= 1e-3  # a group of its own, of which nothing is kept
        model = sgfx.compile(model, groups=3, ratio=0.6)
    images = torch.randn(2, 3, 8, 8).double()
    (region,) = find_regions(model, (images,)).parts
    made = region.graphs["eval"]
    assert find_shapes(made, (images,))
    return made, images


def started(graph, images):
    return Compilation(graph, {PART: "", SHAPES: (images,)})


class Watching(Running):
    """Runs a graph, and notes where a tensor has another shape than its node says."""

    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, Tensor) and "val" in n.meta:
            assert value.shape == n.meta["val"].shape, n
        return value


@torch.no_grad()
def run(graph, images):
    return Watching(graph).run(images)


def test_shapes_and_values_are_true_after_every_rewrite(graph):
    graph, images = graph
    expected, compilation = run(graph, images), started(graph, images)
    for each in REWRITES:
        run_passes([each], compilation)
        assert (run(graph, images) - expected).abs().max() < 1e-12, each.name
    kinds = [type(module) for module in graph.modules()]
    assert kinds.count(Recipe) == 6
    assert kinds.count(FusedNorm) == 1  # which the mean reads


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_but_the_one_that_makes_recipes_can_be_left_out(graph, name):
    graph, images = graph
    expected = run(graph, images)
    run_passes([each for each in REWRITES if each.name != name], started(graph, images))
    assert (run(graph, images) - expected).abs().max() < 1e-12


def test_rules_may_stand_in_another_order(graph):
    graph, images = graph
    expected, compilation = run(graph, images), started(graph, images)
    names = ["make recipes", "fuse activations", "fuse sums", "fold norms", "fuse sums", "fuse activations"]
    run_passes([BY_NAME[name] for name in names], compilation)
    assert (run(graph, images) - expected).abs().max() < 1e-12


def test_twice_is_as_once(graph):
    graph, images = graph
    expected, compilation = run(graph, images), started(graph, images)
    run_passes(REWRITES, compilation)
    nodes = len(graph.graph.nodes)
    run_passes([each for each in REWRITES if each.name not in ("make recipes", "fold constants")], compilation)
    assert abs(len(graph.graph.nodes) - nodes) <= 1  # `contiguous` once more, which is nothing
    assert (run(graph, images) - expected).abs().max() < 1e-12


def test_constants_come_before_thresholds(graph):
    graph, images = graph
    before = [BY_NAME[name] for name in ("make recipes", "keep norms", "fuse activations", "use thresholds")]
    with pytest.raises(PassError, match=r"pass 'fold constants' requires plain inputs \(ran before it: make recipes, "):
        run_passes([*before, BY_NAME["fold constants"]], started(graph, images))


def test_rules_come_after_the_recipes(graph):
    graph, images = graph
    with pytest.raises(PassError, match=r"pass 'fold norms' requires unfused \(ran before it: nothing\)"):
        run_passes([BY_NAME["fold norms"]], started(graph, images))


def test_a_graph_without_shapes_is_not_rewritten(graph):
    graph, _ = graph
    with pytest.raises(PassError, match=r"pass 'drop nothing' requires shapes"):
        run_passes(REWRITES, Compilation(graph, {PART: ""}))


class Forgetful(Rewrite):
    """A rewrite that takes a filter out and forgets to say so."""

    name = "forgetful"

    def run(self, compilation):
        recipe = next(module for module in compilation.model.modules() if isinstance(module, Recipe))
        recipe.keep(torch.arange(recipe.layer.out_channels - 1))


def test_false_shapes_are_found(graph):
    graph, images = graph
    compilation = run_passes(REWRITES[:2], started(graph, images))
    with pytest.raises(PassError, match=r"pass 'forgetful' left a wrong result .*: frozen_stem is said to give \(2, 6"):
        run_passes([Forgetful()], compilation)


def test_outputs_of_another_shape_are_found():
    (region,) = find_regions(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (torch.rand(2, 3, 8, 8),)).parts
    graph = region.graphs["eval"]
    assert false_shape(graph) is None
    (call,) = [node for node in graph.graph.nodes if node.target == "1"]
    call.replace_all_uses_with(call.args[0])
    assert false_shape(graph) == "the graph gives [(2, 4, 8, 8)], and gave [(2, 256)]"


def test_reasons_are_facts_that_each_rule_replaces(graph):
    graph, images = graph
    compilation = run_passes(REWRITES[:3], started(graph, images))
    before = compilation[UNFUSED]
    run_passes(REWRITES[3:], compilation)
    assert set(before) == {"norms.0", "norms.1", "norms.2"}  # which the rule for norms alone has seen
    assert compilation[UNFUSED] == {"norms.2": f"{before['norms.2']}, and what reads it is no layer"}
