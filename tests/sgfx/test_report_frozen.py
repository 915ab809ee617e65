"""Reports of frozen models: counted from the plans, with what was measured."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.freezing.choosing.decisions import Decisions
from sgfx.reporting.counting import count_macs


class Net(nn.Module):
    """8 filters of 3×3 on 10×10, a depthwise layer, 12 of 3×3 with stride 2, called twice; then a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.deconv, self.last = nn.ConvTranspose2d(12, 2, 2, stride=2), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.norm(self.first(x)))))
        y = self.second(x) + F.interpolate(self.second(x[:, :, :4, :4]), size=5)
        return self.last(y.mean((2, 3))), self.deconv(y)


IMAGE = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def models():
    torch.manual_seed(0)
    dense = Net().eval()
    return dense, sgfx.compile(dense, groups=3, ratio=0.3)  # every filter is read


@pytest.mark.parametrize("strategy", [None, "library"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_layers_are_counted_from_their_plans(models, strategy, batch):
    dense, small = models
    frozen = sgfx.freeze(small, IMAGE, strategy=strategy)
    report = sgfx.report(dense, frozen, torch.cat([IMAGE, IMAGE])[:batch])
    kept = {path: int(plan.mask().sum()) for path, plan in sgfx.plans(small).items() if plan.grouped}
    assert set(kept) == {"second", "last"}
    expected = {  # path: parameters, a bias for each filter; MACs of one image
        "first": (8 * 27 + 8, 8 * 27 * 100),
        "depthwise": (8 * 9 + 8, 8 * 9 * 100),
        "second": (kept["second"] * 9 + 12, kept["second"] * 9 * (25 + 4)),
        "deconv": (12 * 2 * 4 + 2, 12 * 2 * 4 * 25),
        "last": (kept["last"] + 5, kept["last"]),
    }
    assert {layer.path: (layer.params, layer.macs) for layer in report.layers} == {
        path: (params, batch * macs) for path, (params, macs) in expected.items()
    }
    assert report.macs == batch * sum(macs for _, macs in expected.values())
    assert report.params == sum(params for params, _ in expected.values())
    assert report.macs_dense == count_macs(dense, (torch.cat([IMAGE, IMAGE])[:batch],))[""]
    assert report.filters_eliminated == report.params_eliminated == report.macs_eliminated == 0


def test_what_was_measured_stands_in_it(models):
    dense, small = models
    frozen = sgfx.freeze(small, IMAGE)
    report = sgfx.report(dense, frozen, IMAGE)
    layers = {layer.path: layer for layer in report.layers}
    made = frozen.decisions.layers["depthwise"]
    assert (layers["depthwise"].ms, layers["depthwise"].ms_dense) == (made.ms, made.ms_library)
    assert layers["depthwise"].gmacs_per_second == pytest.approx(made.macs / made.ms / 1e6)
    twice = [frozen.decisions.layers[name] for name in ("second", "second#2")]
    assert layers["second"].ms == pytest.approx(sum(each.ms for each in twice))
    assert layers["second"].macs == sum(each.macs for each in twice)
    assert (layers["deconv"].way, layers["deconv"].ms) == ("", None)
    assert report.decisions is frozen.decisions
    assert (
        Decisions.from_dict(json.loads(json.dumps(report.to_dict()))["decisions"] | {"version": 1}) == frozen.decisions
    )
    assert all(word in str(report) for word in ("GMAC/s", "ms dense", "measured on", "library alone"))
    forced = sgfx.report(dense, sgfx.freeze(small, IMAGE, strategy="library"), IMAGE)
    assert {layer.way for layer in forced.layers} == {"library", ""}
    assert {layer.ms for layer in forced.layers} == {None}
    assert not forced.decisions.milliseconds


def test_a_frozen_dense_model(models):
    dense, _ = models
    report = sgfx.report(dense, sgfx.freeze(dense, IMAGE), IMAGE)
    assert report.macs == report.macs_dense
    assert all(layer.macs == layer.macs_dense for layer in report.layers)
    assert {layer.reason for layer in report.layers} == {"dense", "not frozen"}


def test_filters_that_freezing_took_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    small = sgfx.compile(model, groups=4, ratio=0.9)
    smaller = sgfx.compile(model, groups=4, ratio=0.9, eliminate=True)
    report = sgfx.report(model, sgfx.freeze(small, IMAGE), IMAGE)
    expected = sgfx.report(model, smaller, IMAGE)
    assert report.filters_eliminated >= expected.filters_eliminated > 0
    frozen = sgfx.report(model, sgfx.freeze(smaller, IMAGE), IMAGE)
    assert (report.macs, report.params, report.macs_eliminated) == (frozen.macs, frozen.params, frozen.macs_eliminated)
    assert report.macs == sum(each.macs for each in sgfx.freeze(small, IMAGE).decisions.layers.values())


class Detector(nn.Module):
    """Code that can't be traced around a network, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Net(), nn.Linear(5, 4)

    def forward(self, images):
        found = [self.backbone(image[None]) for image in images]
        return torch.cat([self.head(classes) + picture.mean() for classes, picture in found])


def test_a_model_of_several_regions():
    torch.manual_seed(0)
    dense = Detector().eval()
    small = sgfx.compile(dense, groups=3, ratio=0.3, example_inputs=IMAGE)
    frozen = sgfx.freeze(small, IMAGE)
    report, before = sgfx.report(dense, frozen, IMAGE), sgfx.report(dense, small, IMAGE)
    assert [layer.path for layer in report.layers] == [layer.path for layer in before.layers]
    assert report.macs == before.macs
    assert {layer.path: layer.macs for layer in report.layers} == {layer.path: layer.macs for layer in before.layers}
    counts = count_macs(frozen, (IMAGE,))
    assert counts["backbone"] + counts["head"] == counts[""] == before.macs


def test_refusals(models):
    dense, small = models
    frozen = sgfx.freeze(small, IMAGE, strategy="library")
    other = Net()
    other.second = nn.Conv2d(8, 12, 1)
    with pytest.raises(sgfx.InputError, match="no frozen form of dense: layer 'second' of small is not in dense"):
        sgfx.report(other, frozen, IMAGE)
    other = Net()
    other.first = nn.Conv2d(3, 4, 3)
    with pytest.raises(sgfx.InputError, match="no frozen form of dense: layer 'first'"):
        sgfx.report(other, sgfx.freeze(dense, IMAGE, strategy="library"), IMAGE)
    with pytest.raises(sgfx.InputError, match="do not fit"):
        sgfx.report(dense, frozen, torch.zeros(2, 4, 8, 8))
    with pytest.raises(sgfx.InputError, match="frozen model: give the compiled model that it was made from"):
        sgfx.verify(dense, frozen, IMAGE)
