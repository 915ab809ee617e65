"""`sgfx.report`: numbers against closed forms."""

import json

import pytest
import torch
from torch import nn

import sgfx
from passes.layers.grouped import Grouped
from sgfx.reporting import counting
from sgfx.reporting.counting import count_macs

IMAGE = torch.zeros(2, 3, 10, 10)


class Net(nn.Module):
    """8 filters of 3×3 on 10×10, then 12 of 3×3 with stride 2, then a linear layer; a depthwise one in between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.second(self.depthwise(self.norm(self.first(x)))).mean((2, 3)))


@pytest.fixture
def models():
    torch.manual_seed(0)
    dense = Net()
    return dense, sgfx.compile(dense, groups=3, ratio=0.6, linear_ratio=0.4)


def test_parameters_and_macs_of_every_layer(models):
    dense, small = models
    plans = sgfx.plans(small)
    layers = {layer.path: layer for layer in sgfx.report(dense, small, IMAGE).layers}
    assert list(layers) == ["first", "depthwise", "second", "last"]
    kept = {path: int(plans[path].mask().sum()) for path in ("second", "last")}
    batch = len(IMAGE)
    expected = {  # path: parameters and MACs, dense and small
        "first": (8 * 27, 8 * 27, batch * 8 * 27 * 100, batch * 8 * 27 * 100),
        "depthwise": (8 * 9 + 8, 8 * 9 + 8, batch * 8 * 9 * 100, batch * 8 * 9 * 100),
        "second": (12 * 72 + 12, kept["second"] * 9 + 12, batch * 12 * 72 * 25, batch * kept["second"] * 9 * 25),
        "last": (12 * 5 + 5, kept["last"] + 5, batch * 60, batch * kept["last"]),
    }
    for path, numbers in expected.items():
        layer = layers[path]
        assert (layer.params_dense, layer.params, layer.macs_dense, layer.macs) == numbers, path
    second = layers["second"]
    assert (second.groups, second.requested_ratio) == (plans["second"].groups, 0.6)
    assert second.achieved_ratio == pytest.approx(1 - kept["second"] / 96)
    assert sum(filters for filters, _ in second.block_sizes) == 12
    assert layers["first"].reason == "first convolution"
    assert layers["depthwise"].reason == "depthwise convolution"


def test_totals_and_what_was_asked_for_beside_what_was_achieved(models):
    dense, small = models
    report = sgfx.report(dense, small, IMAGE)
    norm = 16
    assert report.params_dense == sum(layer.params_dense for layer in report.layers) + norm
    assert report.params == sum(layer.params for layer in report.layers) + norm
    assert report.macs_dense == sum(layer.macs_dense for layer in report.layers)
    assert report.macs == sum(layer.macs for layer in report.layers)
    assert report.connections_removed.requested == pytest.approx((0.6 * 96 + 0.4 * 60) / 156)
    kept = sum(sgfx.plans(small)[path].connections for path in ("second", "last"))
    assert report.connections_removed.achieved == pytest.approx(1 - kept / 156)
    assert report.params_removed.requested == pytest.approx((0.6 * 864 + 0.4 * 60) / report.params_dense)
    assert report.params_removed.achieved == pytest.approx(1 - report.params / report.params_dense)
    asked = 0.6 * 2 * 864 * 25 + 0.4 * 2 * 60
    assert report.macs_removed.requested == pytest.approx(asked / report.macs_dense)
    assert report.macs_removed.achieved == pytest.approx(1 - report.macs / report.macs_dense)


def test_it_prints_every_layer_and_reason_and_gives_plain_data(models):
    report = sgfx.report(*models, IMAGE)
    text = str(report)
    for layer in report.layers:
        assert layer.path in text
        assert layer.reason is None or layer.reason in text
    assert max(map(len, text.splitlines())) <= 130
    data = json.loads(json.dumps(report.to_dict()))
    assert data["macs"] == report.macs
    assert data["layers"][2]["block_sizes"] == [list(size) for size in report.layers[2].block_sizes]


def test_a_masked_model_computes_as_much_as_the_dense_one():
    dense = Net()
    pruner = sgfx.Pruner(dense, groups=3, ratio=0.6, step=0.3)
    list(pruner)
    report = sgfx.report(dense, pruner.model, IMAGE)
    assert (report.params, report.macs) == (report.params_dense, report.macs_dense)
    assert report.layers[2].achieved_ratio == pytest.approx(0.6, abs=0.1)


def test_neither_model_is_run_or_changed(models):
    fired = []
    for model in models:
        model.register_forward_hook(lambda *_: fired.append(1))
        model.train()
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    torch.manual_seed(5)
    sgfx.report(*models, torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))
    assert fired == []
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert models[1].second.form == "dense"


class Untraceable(Net):
    """What jit can't trace: a forward that returns an object of its own."""

    def forward(self, x):
        return {"out": Output(super().forward(x))}


class Output:
    def __init__(self, scores):
        self.scores = scores


def test_a_model_that_fvcore_can_not_trace_is_counted_all_the_same():
    counted, expected = count_macs(Untraceable(), (IMAGE,)), count_macs(Net(), (IMAGE,))
    assert {path: counted[path] for path in ("", "first", "second", "last")} == {
        path: expected[path] for path in ("", "first", "second", "last")
    }


def test_a_report_says_where_fvcore_did_not_count(models):
    plain = sgfx.report(*models, IMAGE)
    assert plain.counting == ""
    assert "fvcore" not in str(plain)
    dense = Untraceable()
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=IMAGE)
    report = sgfx.report(dense, small, IMAGE)
    said = "MACs of dense and small are torch's flop counter's, since fvcore can't trace the model: "
    assert report.counting.startswith(said)
    assert len(report.counting) > len(said)
    assert report.counting in str(report).splitlines()
    assert report.to_dict()["counting"] == report.counting
    assert report.macs < report.macs_dense == plain.macs_dense


def test_a_report_says_it_of_the_one_model_that_it_is_true_of(models, monkeypatch):
    dense, small = models
    counted = counting._counted_by_fvcore

    def only_dense(model, inputs):
        if any(isinstance(module, Grouped) for module in model.modules()):
            raise RuntimeError("x" * 500 + "\nmore")
        return counted(model, inputs)

    expected = sgfx.report(dense, small, IMAGE)
    monkeypatch.setattr(counting, "_counted_by_fvcore", only_dense)
    report = sgfx.report(dense, small, IMAGE)
    assert report.counting == (
        f"MACs of small are torch's flop counter's, since fvcore can't trace the model: {'x' * counting.LONGEST}…"
    )
    assert (report.macs_dense, report.macs) == (expected.macs_dense, expected.macs)


def test_what_can_not_be_compared_is_refused(models):
    dense, small = models
    with pytest.raises(sgfx.InputError, match="small has no layer plans"):
        sgfx.report(dense, Net(), IMAGE)
    with pytest.raises(sgfx.InputError, match="small is no compiled form of dense: layer 'first'"):
        sgfx.report(nn.Sequential(nn.Linear(3, 4)), small, IMAGE)
    with pytest.raises(sgfx.InputError, match=r"example_inputs of shape \[2, 4, 10, 10\] do not fit Net"):
        sgfx.report(dense, small, torch.zeros(2, 4, 10, 10))
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple of positional"):
        sgfx.report(dense, small, [IMAGE])


def test_what_elimination_saved_stands_beside_the_ratios():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1))
    model[2].weight.data[:, :2] = 0
    options = {"ratio": 0.0, "groups": 1, "overrides": {"2": {"ratio": 0.25}}}
    images = torch.zeros(1, 3, 5, 5)
    plain = sgfx.report(model, sgfx.compile(model, **options), images)
    assert (plain.filters_eliminated, plain.params_eliminated, plain.macs_eliminated) == (0, 0, 0)
    small = sgfx.report(model, sgfx.compile(model, eliminate=True, **options), images)
    # Two filters of three weights and a bias, and two entries in the norm's weight and bias.
    assert (small.filters_eliminated, small.params_eliminated) == (2, 2 * 4 + 2 * 2)
    assert small.macs_eliminated == 2 * 3 * 25
    assert "eliminated beyond the ratios: 2 filters that nobody reads, 12 parameters, 150 MACs" in str(small)
