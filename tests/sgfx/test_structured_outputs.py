"""Models that give dataclasses, named tuples, dicts and numbers: all of it is compared, or refused by its place."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import sgfx
from passes.layers.grouped import Grouped
from passes.tracing.trace import trace

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Found:
    scores: Any
    features: Any = None


class Named(NamedTuple):
    scores: Any
    features: Any


@dataclass
class DictToo(OrderedDict):
    scores: Any = None
    features: Any = None

    def __post_init__(self):
        self.update(scores=self.scores, features=self.features)


@dataclass
class Computing:
    scores: Any
    features: Any

    def __post_init__(self):
        self.scores = self.scores * 2


class Opaque:
    def __init__(self, scores, features):
        self.scores = scores


FORMS = {
    "dataclass": Found,
    "named tuple": Named,
    "dict and dataclass": DictToo,
    "nested": lambda scores, features: {"all": [Found(scores, Named(features, "name")), 3, None]},
}


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.form = form

    def forward(self, x):
        y = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.form(self.fc(y.mean((2, 3))), y)


def pair(form, **options):
    torch.manual_seed(0)
    dense = Net(form)
    return dense, sgfx.compile(dense, groups=3, ratio=0.6, **options)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def tensors(output):
    """By hand, in place of what is tested."""
    if isinstance(output, dict) and "all" in output:
        output = Found(output["all"][0].scores, output["all"][0].features.scores)
    return output.scores, output.features


def test_what_is_wrong_anywhere_in_the_outputs_is_found(form):
    dense, small = pair(form)
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6
    assert sgfx.verify(dense, small, IMAGES).gradient_error < 1e-6
    small.form = lambda scores, features: form(scores, features * 1.5)
    assert sgfx.verify(dense, small, IMAGES).eval_error == pytest.approx(0.5, rel=1e-4)


def test_what_is_no_tensor_is_compared_too():
    dense, small = pair(lambda scores, features: {"scores": scores, "name": "a", "loss": 2.0})
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6
    small.form = lambda scores, features: {"scores": scores, "name": "b", "loss": 2.0}
    assert sgfx.verify(dense, small, IMAGES).eval_error == float("inf")
    small.form = lambda scores, features: {"scores": scores, "name": "a", "loss": 3.0}
    assert sgfx.verify(dense, small, IMAGES).eval_error == pytest.approx(0.5)
    small.form = lambda scores, features: {"scores": None, "name": "a", "loss": 2.0}
    assert sgfx.verify(dense, small, IMAGES).eval_error == float("inf")


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"^output\[1\] is a Opaque, which can't be taken apart"):
        sgfx.verify(*pair(lambda *both: (both[0], Opaque(*both)), example_inputs=IMAGES), IMAGES)
    with pytest.raises(ValueError, match="there is nothing to compare: the outputs in eval mode hold no tensors"):
        sgfx.verify(*pair(lambda scores, features: {"name": "a", "none": None, "empty": []}), IMAGES)


def test_frozen_models_give_the_same_type(form):
    _, small = pair(form)
    expected = small.eval()(IMAGES)
    for frozen in (fast := sgfx.freeze(small, IMAGES, strategy="library"), copy.deepcopy(fast)):
        given = frozen(IMAGES)
        assert type(given) is type(expected)
        for mine, theirs in zip(tensors(given), tensors(expected), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_frozen_model_that_gives_a_dataclass_is_pickled():
    fast = sgfx.freeze(pair(Found)[1], IMAGES, strategy="library")
    assert torch.equal(pickle.loads(pickle.dumps(fast))(IMAGES).scores, fast(IMAGES).scores)


def test_elimination_sees_what_a_dataclass_gives_out(form):
    dense, small = pair(form, eliminate=True, example_inputs=IMAGES)
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6
    assert small.conv2.out_channels == 8  # given out


def test_filters_behind_a_dataclass_that_nobody_reads_go():
    dense, small = pair(lambda scores, features: Found(scores), eliminate=True, example_inputs=IMAGES, linear_ratio=0.9)
    assert small.conv2.out_channels < 8
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_files_hold_the_fields_as_plain_outputs(suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    _, small = pair(Found)
    written = sgfx.export(small, tmp_path / f"small.{suffix}", IMAGES)
    assert written.max_difference < 1e-6
    if suffix == "pt2":
        given = torch.export.load(tmp_path / "small.pt2").module()(IMAGES)
        expected = small.eval()(IMAGES)
        assert given.keys() == {"scores", "features"}
        assert torch.allclose(given["features"], expected.features, atol=1e-6)


def test_a_model_without_tensors_in_its_outputs_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="was not written: the model's outputs hold no tensors"):
        sgfx.export(pair(lambda scores, features: 3)[1], tmp_path / "small.pt2", IMAGES)


def test_dataclasses_that_compute_their_fields_are_not_traced_into_doing_it_twice():
    dense, small = pair(Computing, example_inputs=IMAGES)
    with pytest.raises(ValueError, match="Computing is a dataclass that computes fields itself"):
        trace(dense)
    assert sum(isinstance(module, Grouped) for module in small.modules()) == 2
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6
    with pytest.raises(ValueError, match="has no part that can be frozen"):
        sgfx.freeze(dense, IMAGES)


def test_inputs_may_be_dataclasses():
    class Reading(Net):
        def forward(self, given):
            return super().forward(given.scores + given.features)

    dense = Reading(Found)
    inputs = (Found(IMAGES, IMAGES),)
    small = sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=inputs, eliminate=True)
    assert sgfx.verify(dense, small, inputs).max_error < 1e-6
    assert sgfx.report(dense, small, inputs).macs < sgfx.report(dense, small, inputs).macs_dense
    frozen = sgfx.freeze(small, inputs, strategy="library")
    assert torch.allclose(frozen(*inputs).scores, small.eval()(*inputs).scores, atol=1e-6)


def test_distillation_compares_dataclasses():
    dense, small = pair(Found)
    before = (small.eval()(IMAGES).features - dense.eval()(IMAGES).features).square().mean()
    sgfx.distill(dense, small, IMAGES, steps=20)
    assert (small.eval()(IMAGES).features - dense.eval()(IMAGES).features).square().mean() < before
