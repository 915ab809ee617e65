"""Inputs by keyword, by position and collected in ``*args``: everything takes them alike."""

import pytest
import torch
from torch import nn

import sgfx
from passes.options.arguments import as_inputs, by_place_and_name, call_model

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SCALE = torch.full((1,), 3.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.conv2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.fc = nn.Linear(8, 10)

    def scores(self, x, scale):
        y = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.fc((y if scale is None else y * scale).mean((2, 3)))


class Usual(Net):
    def forward(self, x, flag=False, scale=None):
        y = self.scores(x, scale)
        return (y, y.sum(1)) if flag else y


class ByName(Net):
    def forward(self, x, flag=False, *, scale):
        return self.scores(x, scale)


class Collecting(Net):
    def forward(self, *xs, **others):
        return self.scores(xs[0] + xs[1], None)


class LastIsDict(Net):
    def forward(self, x, options):
        return self.scores(x, options["scale"])


CASES = {
    "a dict": (Usual, {"x": X, "scale": SCALE}, lambda m: m(X, scale=SCALE)),
    "a dict in another order": (Usual, {"scale": SCALE, "x": X}, lambda m: m(X, scale=SCALE)),
    "a tuple with a dict": (Usual, (X, {"scale": SCALE}), lambda m: m(X, False, SCALE)),
    "a flag": (Usual, (X, {"flag": True}), lambda m: m(X, True)),
    "by name alone": (ByName, {"x": X, "scale": SCALE}, lambda m: m(X, scale=SCALE)),
    "by name alone, behind a flag": (ByName, (X, {"scale": SCALE}), lambda m: m(X, scale=SCALE)),
    "collected": (Collecting, (X, 2 * X), lambda m: m(X, 2 * X)),
    "a dict that is an argument": (LastIsDict, (X, {"scale": SCALE}, {}), lambda m: m(X, {"scale": SCALE})),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("case", CASES)
def test_everything_takes_them(case, tmp_path):
    kind, inputs, run = CASES[case]
    torch.manual_seed(0)
    dense = kind()
    options = {"groups": 3, "ratio": 0.6, "example_inputs": inputs}
    small = sgfx.compile(dense, eliminate=True, **options)
    assert sum(plan.grouped for plan in sgfx.plans(small).values()) == 2
    assert sgfx.verify(dense, small, inputs).max_error < 1e-6
    assert sgfx.report(dense, small, inputs).macs < sgfx.report(dense, small, inputs).macs_dense
    frozen = sgfx.freeze(small, inputs, strategy="library")
    assert isinstance(frozen, torch.fx.GraphModule)
    assert torch.allclose(first(call_model(frozen, as_inputs(inputs, small))), first(run(small.eval())), atol=1e-6)
    pruner = sgfx.Pruner(dense, step=0.3, **options)
    assert len(list(pruner)) == 2
    if kind is not ByName:
        assert sgfx.export(small, tmp_path / "small.pt2", inputs).max_difference < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_they_are_bound_as_python_binds_them(case):
    kind, inputs, run = CASES[case]
    torch.manual_seed(0)
    model = kind().eval()
    assert torch.equal(first(call_model(model, as_inputs(inputs, model))), first(run(model)))


def test_a_frozen_model_takes_the_same_names():
    frozen = sgfx.freeze(Usual(), {"x": X, "scale": SCALE}, strategy="library")
    assert torch.equal(frozen(x=X, scale=SCALE), frozen(X, scale=SCALE))
    frozen = sgfx.freeze(ByName(), {"x": X, "scale": SCALE}, strategy="library")
    assert not torch.equal(frozen(X, scale=2 * SCALE), frozen(X, scale=SCALE))


def test_arguments_that_can_only_be_given_by_name_come_last():
    model = ByName()
    assert as_inputs({"x": 1, "scale": 2}, model) == (1, False, 2)
    assert by_place_and_name(model, (1, False, 2)) == ((1, False), {"scale": 2})
    assert by_place_and_name(model, (1,)) == ((1,), {})
    assert by_place_and_name(Collecting(), (1, 2, 3)) == ((1, 2, 3), {})


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        (Usual, {"y": X}, "example_inputs do not fit Usual.forward: missing a required argument: 'x'"),
        (Usual, {"x": X, "y": X}, "example_inputs do not fit Usual.forward: got an unexpected keyword argument 'y'"),
        (Usual, (X, {"x": X}), "multiple values for argument 'x'"),
        (LastIsDict, (X, {"scale": SCALE}), "add an empty dict if it is the last positional argument itself"),
        (Collecting, (X, X, {"third": X}), r"takes 'third' in \*\*others, where its use can't be followed: wrap"),
    ],
)
def test_what_does_not_fit_is_refused(kind, inputs, message):
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.compile(kind(), ratio=0.5, example_inputs=inputs)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"a tensor, a tuple of positional arguments .* or such a dict, not list"):
        sgfx.compile(Usual(), ratio=0.5, example_inputs=[X])


def test_the_number_of_collected_arguments_must_be_known():
    with pytest.raises(
        sgfx.InputError, match=r"its forward takes \*xs: give example_inputs, so that their number is known"
    ):
        sgfx.compile(Collecting(), ratio=0.5)


def test_files_take_no_arguments_by_name_alone(tmp_path):
    with pytest.raises(sgfx.InputError, match=r"ByName\.forward takes 'scale' by name alone: wrap the model"):
        sgfx.export(ByName(), tmp_path / "small.pt2", {"x": X, "scale": SCALE})


@pytest.mark.parametrize("kind", [Usual, ByName])
def test_batches_may_be_dicts(kind):
    torch.manual_seed(0)
    dense = kind()
    inputs = {"x": X, "scale": SCALE.expand(4, 1)[:, :, None, None]}
    small = sgfx.compile(dense, groups=3, ratio=0.6)
    other = sgfx.compile(dense, groups=3, ratio=0.6)
    sgfx.calibrate(dense, small, [{**inputs, "labels": torch.zeros(4), "name": "unknown"}])
    error, before = ((model.eval()(**inputs) - dense.eval()(**inputs)).square().mean() for model in (small, other))
    assert error < before
    sgfx.distill(dense, small, [inputs], steps=20)


def test_a_dict_without_anything_that_the_forward_knows_is_refused():
    small = sgfx.compile(Usual(), ratio=0.5)
    with pytest.raises(
        sgfx.InputError, match=r"batch 1 of data is a dict with the keys \['image', 'labels'\], and Usual"
    ):
        sgfx.calibrate(Usual(), small, [{"image": X, "labels": 0}])
