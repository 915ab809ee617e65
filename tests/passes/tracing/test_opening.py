"""Which subclasses of torch's layers are regrouped, one refusal for each rule, and what graphs have in their place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.compression.selection import select
from passes.errors import InputError
from passes.layers.custom import is_custom
from passes.options.checks import checked_settings
from passes.tracing.regions import find_regions
from tests.tools import custom_layers as layers
from tests.tools.custom_layers import Around


def decided(model, **options):
    """The targets, and the reasons of all else."""
    settings = checked_settings(model, **{"ratio": 0.5} | options)
    regions = find_regions(model, settings.example_inputs, settings.leaf_modules)
    return select(model, regions, settings)


@pytest.mark.parametrize(
    "layer",
    [
        layers.SameStatic(16, 16, 3, 2),
        layers.SameDynamic(16, 16, 3, 2),
        layers.WithNorm(16, 16, 3, norm=nn.BatchNorm2d(16), activation=nn.ReLU()),
        layers.Checked(16, 16, 3, norm=nn.BatchNorm2d(16)),
        layers.ShapeReader(16, 16, 3),
        layers.AroundTheCall(16, 16, 3),
        layers.Named(16),
        layers.BiasApart(16, 16, 3),
        layers.Counting(16, 16, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_subclass_whose_weight_goes_into_one_call_is_regrouped(layer):
    assert "layer" in decided(Around(layer))[0]


def test_other_kinds_of_layers_are_regrouped_too():
    model = nn.Sequential(nn.Conv1d(3, 8, 1), layers.Signal(8, 8, 3), nn.Flatten(), layers.LowRank(8 * 6, 8))
    assert set(decided(model)[0]) == {"1", "3", "3.gate"}
    assert set(decided(nn.Sequential(nn.Conv3d(3, 8, 1), layers.Volume(8, 8, 3)))[0]) == {"1"}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layers.Standardised(16, 16, 3), r"subclass of torch's layers \(Standardised\), and its weight .* by 'mean'"),
        (layers.Twice(16, 16, 3), "weight is used more than once"),
        (layers.DynamicallyScaled(16, 16, 3), r"DynamicallyScaled\), and its weight is computed first, by 'div"),
        (layers.SelfHolding(16, 16, 1), "also held outside the registered submodules, by 'layer.run'"),
        (layers.OwnState(16, 16, 1), "has its own '_save_to_state_dict'"),
        (layers.SameStatic(16, 16, 3, groups=16), "depthwise"),
        (layers.SameStatic(16, 16, 3, groups=4), "already grouped"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_that_does_more_stays_and_says_why(layer, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decided(Around(layer))[1]["layer"])


def test_linear_layers_that_do_more_stay():
    model = nn.Sequential(nn.Linear(8, 8), layers.Scaled(8, 8), layers.Transposed(8, 8))
    reasons = decided(model)[1]
    assert "computed first, by 'mul'" in reasons["1"]  # in training alone
    assert "computed first, by 't'" in reasons["2"]


def test_weights_that_others_use_stay():
    class Tied(Around):
        def forward(self, x):
            return super().forward(x) + F.conv2d(self.stem(x), self.layer.weight).mean()

    class ShapeOutside(Around):
        def forward(self, x):
            return super().forward(x) * self.layer.weight.shape[0]

    for kind in (Tied, ShapeOutside):
        reason = decided(kind(layers.SameStatic(16, 16, 3)))[1]["layer"]
        assert "its weight is read by an operation outside its own call" in reason
    shared = Around(layers.SameStatic(16, 16, 1))
    shared.next = layers.SameStatic(16, 16, 1)
    shared.next.weight = shared.layer.weight
    assert "shared with 'next.weight'" in decided(shared)[1]["layer"]
    listed = Around(layers.SameStatic(16, 16, 3))
    listed.kept = [listed.layer.weight]
    assert "held outside the registered parameters" in decided(listed)[1]["layer"]


def test_what_is_changed_about_a_subclass_is_seen():
    replaced = Around(layers.SameStatic(16, 16, 3))
    replaced.layer.forward = lambda x: x
    assert "forward was replaced on the instance" in decided(replaced)[1]["layer"]
    parametrized = Around(nn.utils.parametrizations.weight_norm(layers.SameStatic(16, 16, 3)))
    assert "parametrized" in decided(parametrized)[1]["layer"]
    named = Around(layers.SameStatic(16, 16, 3))
    named.layer.filters = 3
    assert "'filters' has a name that regrouped layers use" in decided(named)[1]["layer"]


def test_torchs_own_subclasses_stay():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert not is_custom(model[1].out_proj)
    assert "1.out_proj" not in decided(nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), model[1]])[0])[0]


def test_an_override_may_name_a_subclass():
    assert "layer" in decided(Around(layers.SameStatic(16, 16, 3)), overrides={"layer": {"groups": 2}})[0]
    with pytest.raises(InputError, match="can't be regrouped: a subclass of torch's layers"):
        decided(Around(layers.Standardised(16, 16, 3)), overrides={"layer": {"groups": 2}})


def test_a_forward_with_two_arguments_is_traced_into():
    class Two(Around):
        def forward(self, x):
            x = self.stem(x)
            return self.last(self.next(self.layer(x, x.mean((2, 3), keepdim=True))).mean((2, 3)))

    assert "layer" in decided(Two(layers.Gated(16, 16, 3)))[0]


def test_a_layer_outside_every_region_is_tried_out_with_what_it_is_called_with():
    class Loop(Around):
        def forward(self, x):
            while x.abs().max() > 1:
                x = x / 2
            x = self.stem(x)
            return self.last(self.next(self.layer(x, x.mean((2, 3), keepdim=True))).mean((2, 3)))

    model, images = Loop(layers.Gated(16, 16, 3)), torch.randn(1, 3, 16, 16)
    with pytest.raises(InputError, match=r"'layer': outside every part .* give example_inputs"):
        decided(model)
    assert "layer" in decided(model, example_inputs=images)[0]


def test_graphs_have_a_plain_layer_and_what_is_around_it():
    norm = nn.BatchNorm2d(16)
    regions = find_regions(Around(layers.WithNorm(16, 16, 3, padding=1, norm=norm, activation=nn.ReLU())))
    region = regions.parts[0]
    assert region.opened == {"layer"}
    assert not regions.closed
    for graph in region.graphs.values():
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
        assert called[1:4] == ["layer", "layer.norm", "layer.activation"]
        plain = graph.get_submodule("layer")
        assert type(plain) is nn.Conv2d
        assert plain.padding == (1, 1)
        assert plain.norm is graph.get_submodule("layer.norm")
        assert not any(node.op == "get_attr" for node in graph.graph.nodes)


def test_graphs_have_a_layer_whole_that_is_not_always_called_alike():
    class Step(nn.Conv2d):
        def forward(self, x, stride):
            return F.conv2d(x, self.weight, self.bias, stride)

    class Steps(Around):
        def forward(self, x):
            x = self.stem(x)
            return self.last(self.next(self.layer(self.layer(x, 1), 2)).mean((2, 3)))

    model = Steps(Step(16, 16, 3))
    regions = find_regions(model, (torch.randn(2, 3, 16, 16),))
    assert regions.closed == {"layer": ""}
    assert not regions.parts[0].opened
    assert "layer" in decided(model, example_inputs=torch.randn(2, 3, 16, 16))[0]
    assert "nor run on" in decided(model)[1]["layer"]


def test_the_live_model_is_neither_run_nor_changed():
    class Clipping(nn.Conv2d):
        def forward(self, x):
            if x.shape[-1] > 2:
                self.calls = getattr(self, "calls", 0) + 1
                self.bias.data.clamp_(0, 0)
            return super().forward(x)

    model = Around(Clipping(16, 16, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decided(model)
    assert not hasattr(model.layer, "calls")
    assert type(model.layer) is Clipping
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
