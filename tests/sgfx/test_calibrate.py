"""`sgfx.calibrate`: against least squares worked out apart, what it leaves alone, and its refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sgfx
from passes.calibration import sampling
from passes.calibration.followers import followers_of
from tests.passes.calibration.test_calibrating_regions import Difference, Parts, Residual, images, made


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def error(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    difference = outputs(small, x) - outputs(dense, x)
    return float(difference.square().mean() / outputs(dense, x).var())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_convolution_is_its_least_squares():
    dense = made(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2, padding=1)))
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    x = images(6)
    start = small[1].dense_weight().detach()
    sgfx.calibrate(dense, small, x)
    rows = F.unfold(outputs(dense[0], x), 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
    wanted = outputs(dense[1], outputs(dense[0], x)).flatten(2).transpose(1, 2).flatten(0, 1)
    rows, middle = rows - rows.mean(0), wanted - wanted.mean(0)
    penalty = 1e-3 * float(rows.square().sum(0).mean())
    plan = sgfx.plans(small)["1"]
    for filter_, kept in enumerate(plan.mask()):
        keep = kept.repeat_interleave(9)
        below = penalty**0.5 * torch.eye(int(keep.sum()), dtype=torch.float64)
        left = torch.cat([rows[:, keep], below])
        right = torch.cat([middle[:, filter_], below @ start[filter_].flatten()[keep]])
        expected = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(
            small[1].dense_weight()[filter_].detach().flatten()[keep], expected, rtol=1e-8, atol=1e-8
        )
    means = outputs(small, x).mean((0, 2, 3)), outputs(dense, x).mean((0, 2, 3))
    torch.testing.assert_close(*means, rtol=0, atol=1e-9)  # the bias: no error on average


def test_what_nothing_is_pruned_from_finds_back_to_the_dense_model():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.0)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.02)
        small.stem.weight.sub_(0.02), small.stem.bias.sub_(0.02)
        for norm in (small.bn1, small.bn2):
            norm.weight.sub_(0.02), norm.bias.sub_(0.02)
    before = error(dense, small, images(16))
    assert sgfx.calibrate(dense, small, images(16)) is small
    assert error(dense, small, images(16, seed=5)) < 1e-4 * before


def test_calibration_takes_most_of_the_error_away():
    dense = made(Residual())
    pruned = sgfx.compile(dense, groups=4, ratio=0.5)
    small = sgfx.compile(dense, groups=4, ratio=0.5, calibration=images(32))
    assert error(dense, small, images(16, seed=5)) < 0.3 * error(dense, pruned, images(16, seed=5))
    assert sgfx.plans(small) == sgfx.plans(pruned)


class Sum(nn.Module):
    """Two layers that read the same and are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one = nn.Conv2d(8, 6, 1)
        self.other = nn.Conv2d(8, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.one(x) + self.norm(self.other(x))


def test_the_layer_before_a_sum_makes_up_for_the_other_branch(monkeypatch):
    dense = made(Sum())
    options = {"groups": 2, "ratio": 0.75, "overrides": {"other": {"ratio": 0.0}}, "calibration": images(16)}
    assert error(dense, sgfx.compile(dense, **options), images(16)) < 1e-4
    monkeypatch.setattr(sampling, "followers_of", lambda *args: replace(followers_of(*args), other=None))
    assert error(dense, sgfx.compile(dense, **options), images(16)) > 0.1


def test_what_a_sum_spreads_over_more_is_aimed_at_itself():
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(x)
            return F.relu(x + self.one(x))

    dense = made(Spread())
    small = sgfx.compile(dense, groups=2, ratio=0.25)
    before = error(dense, small, images(64))
    sgfx.calibrate(dense, small, images(64))
    assert error(dense, small, images(64)) < before


def test_norms_that_several_layers_share_are_left_alone():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
            self.other, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.one(self.stem(x))))
            return F.relu(self.norm(self.other(x)))

    dense = made(Shared())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = error(dense, small, images(32))
    sgfx.calibrate(dense, small, images(32))
    assert error(dense, small, images(32)) < before
    assert torch.equal(small.norm.running_mean, dense.norm.running_mean)


def test_a_layer_that_is_called_twice_is_solved_for_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([self.head(x), self.head(-3 * x + 1)], 1)

    dense = made(Twice())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    sgfx.calibrate(dense, small, images(16))
    only_first = nn.Sequential(dense.stem, dense.head)
    first = sgfx.compile(only_first, groups=2, ratio=0.5, calibration=images(16))
    other = copy.deepcopy(small)
    other.head.load_state_dict(first[1].state_dict())
    assert error(dense, small, images(16)) < error(dense, other, images(16))


def test_models_of_two_inputs_and_parts_called_by_keyword_are_calibrated():
    x = images(16)
    two = made(Difference())
    small = sgfx.compile(two, groups=2, ratio=0.5, ignore="other", calibration=[(x, x.flip(2))])
    assert not torch.equal(small.head.weight, sgfx.compile(two, groups=2, ratio=0.5, ignore="other").head.weight)
    dense = made(Parts())
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=images(1))
    before = error(dense, small, images(seed=5))
    sgfx.calibrate(dense, small, x)
    assert error(dense, small, images(seed=5)) < 0.5 * before


class Tokens(nn.Module):
    """Linear layers over features, and norms over the tokens, as many as there are features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.first(self.stem(x)))))


def test_a_norm_over_tokens_is_not_the_layers_own():
    dense, tokens = made(Tokens()), images(16).flatten(1).view(-1, 6, 6)
    small = sgfx.compile(dense, groups=2, ratio=0.25, overrides={"stem": {"ratio": 0.0}})
    before = error(dense, small, tokens)
    sgfx.calibrate(dense, small, tokens)
    assert error(dense, small, tokens) < 0.7 * before
    assert torch.equal(small.norm.running_mean, dense.norm.running_mean)


def test_filters_that_the_norm_silences_keep_their_weights_and_means():
    dense = made(Residual())
    with torch.no_grad():
        dense.bn1.weight[2:4] = 0
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    weight, mean = small.conv1.dense_weight().clone(), small.bn1.running_mean.clone()
    sgfx.calibrate(dense, small, images(16))
    same = (small.bn1.running_mean == mean).tolist()
    assert [index for index, kept in enumerate(same) if kept] == [2, 3]
    assert torch.equal(small.conv1.dense_weight()[2:4], weight[2:4])


def test_what_a_users_hook_sees_is_aimed_at_itself():
    dense = made(Sum())
    seen = {}
    dense.norm.register_forward_hook(lambda module, args, output: seen.update(norm=output))
    options = {"groups": 2, "ratio": 0.75, "overrides": {"other": {"ratio": 0.0}}}
    small = sgfx.compile(dense, calibration=images(16), **options)
    outputs(dense, images(16)), seen.update(dense=seen["norm"])
    outputs(small, images(16))
    own = float((seen["norm"] - seen["dense"]).square().mean())
    bent = sgfx.compile(made(Sum()), calibration=images(16), **options)
    bent.norm.register_forward_hook(lambda module, args, output: seen.update(bent=output))
    outputs(bent, images(16))
    assert own < 1e-6 < 0.1 < float((seen["bent"] - seen["dense"]).square().mean())


def test_a_shortcut_that_is_changed_in_place_behind_a_layer_is_read_as_it_is_then():
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.one(x)
            return self.head(y + F.relu(x, inplace=True))

    dense = made(Clipped())
    small = sgfx.compile(dense, groups=2, ratio=0.0)
    with torch.no_grad():
        for layer in (small.one, small.head):
            layer.weight.add_(0.1)
    before = error(dense, small, images(16))
    sgfx.calibrate(dense, small, images(16))
    assert error(dense, small, images(16, seed=5)) < 1e-4 * before


def test_calibrating_under_inference_mode():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5, calibration=images(16))
    with torch.inference_mode():
        other = sgfx.calibrate(dense, sgfx.compile(dense, groups=2, ratio=0.5), images(16))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name])


def test_a_single_example_needs_no_dimension_for_the_batch():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(self.stem(x[0]))])

    dense = made(Single())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = error(dense, small, images(1))
    sgfx.calibrate(dense, small, images(1))
    assert error(dense, small, images(1)) < 0.9 * before


def test_only_kept_weights_biases_and_running_means_change():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    parameters = dict(small.named_parameters())
    before, dense_before = state(small), state(dense)
    small.train()
    calls = []
    small.conv1.register_forward_hook(lambda *_: calls.append(1))
    sgfx.calibrate(dense, small, images())
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    layers = {f"{name}.weight" for name in ("conv1", "conv2", "conv3", "side", "head")}
    assert changed == layers | {f"{name}.bias" for name in ("conv3", "side", "head")} | {
        "bn1.running_mean",
        "bn2.running_mean",
    }
    assert_unchanged(dense, dense_before)
    assert all(small.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert small.training
    assert not calls


def test_the_same_data_give_the_same_weights():
    dense = made(Residual())
    first, second = (sgfx.compile(dense, groups=2, ratio=0.5, calibration=images(40)) for _ in range(2))
    assert_unchanged(first, state(second))


def test_batches_and_labels_make_no_difference():
    dense = made(Residual())
    x = images(8)
    one = sgfx.compile(dense, groups=2, ratio=0.5, calibration=x)
    other = sgfx.compile(dense, groups=2, ratio=0.5, calibration=iter([(x, torch.zeros(8))]))
    assert_unchanged(one, state(other))


def test_elimination_comes_after_calibration():
    dense = made(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    options = {"groups": 2, "ratio": 0.8, "calibration": images(32)}
    small = sgfx.compile(dense, **options)
    cut = sgfx.compile(dense, eliminate=True, **options)
    torch.testing.assert_close(outputs(cut, images()), outputs(small, images()), rtol=0, atol=1e-9)
    assert len(next(iter(cut.parameters()))) < 6
    with pytest.raises(sgfx.InputError, match="filters have been eliminated from small"):
        sgfx.calibrate(dense, cut, images())


def test_inplace_and_steps_calibrate_too():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5, calibration=images())
    model = copy.deepcopy(dense)
    assert sgfx.compile(model, groups=2, ratio=0.5, calibration=images(), inplace=True) is model
    assert_unchanged(model, state(small))
    steps = sgfx.compile(dense, groups=2, ratio=0.5, step=0.25, calibration=images(32))
    assert error(dense, steps, images(seed=5)) < 0.3


def test_fewer_rows_than_inputs_are_carried_by_the_ridge():
    dense = made(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 4)))
    small = sgfx.compile(dense, groups=2, ratio=0.25)
    x = images(2)  # two rows, 256 inputs
    before = error(dense, small, x)
    sgfx.calibrate(dense, small, x)
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())
    assert error(dense, small, x) < 0.01 * before


def test_wide_layers_are_solved_in_the_dual(monkeypatch):
    dense = made(Residual())
    primal = sgfx.compile(dense, groups=2, ratio=0.5, calibration=images())
    monkeypatch.setattr("passes.calibration.layer_solver.CLIPPING_ROUNDS", 0)
    plain = sgfx.compile(dense, groups=2, ratio=0.5, calibration=images())
    monkeypatch.setattr("passes.calibration.layer_solver.MAX_PRIMAL", 0)
    dual = sgfx.compile(dense, groups=2, ratio=0.5, calibration=images())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(dual.state_dict()[name], tensor, rtol=1e-7, atol=1e-7)
    assert not torch.equal(plain.conv1.weight, primal.conv1.weight)


class Untraceable(nn.Module):
    """Two traceable parts with a branch on data between them, which calls a layer that no part holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.alone = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            x = -x
        return self.second(self.alone(x))


def test_what_is_not_to_be_traced_into_is_left():
    dense = made(Untraceable())
    options = {"groups": 2, "ratio": 0.5, "example_inputs": images(1), "leaf_modules": "second", "ignore": "alone"}
    plain = sgfx.compile(dense, **options)
    with pytest.warns(UserWarning, match=r"in eval mode: second\.0, second\.2"):
        small = sgfx.compile(dense, calibration=images(), **options)
    assert torch.equal(small.second[2].weight, plain.second[2].weight)
    assert not torch.equal(small.first[2].weight, plain.first[2].weight)


def test_every_region_is_calibrated_and_a_warning_names_the_rest():
    dense = made(Untraceable())
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=images(1), ignore="alone")
    before = error(dense, small, images(seed=5))
    sgfx.calibrate(dense, small, images(16))
    assert error(dense, small, images(seed=5)) < 0.5 * before
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=images(1))
    alone = small.alone.weight.clone()
    with pytest.warns(UserWarning, match="no traced part of the model calls them in eval mode: alone"):
        sgfx.calibrate(dense, small, images(16))
    assert torch.equal(small.alone.weight, alone)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(4, 5, 6, 6, dtype=torch.float64), "data of shape .*5, 6, 6.* at layer 'stem'"),
        (torch.full((4, 3, 6, 6), float("nan"), dtype=torch.float64), "holds NaN"),
        (torch.zeros(0, 3, 6, 6, dtype=torch.float64), "no examples"),
        (iter(()), "used up before"),
    ],
    ids=["shape", "nan", "empty", "dry"],
)
def test_bad_data_are_refused_and_nothing_is_changed(data, message):
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = state(small)
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.calibrate(dense, small, data)
    assert_unchanged(small, before)


def test_an_error_on_the_way_changes_nothing():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    dense.conv3.weight.data.fill_(float("inf"))
    before = state(small)
    with pytest.raises(sgfx.InputError, match="layer 'conv3' reads or yields NaN or infinite values"):
        sgfx.calibrate(dense, small, images())
    assert_unchanged(small, before)


def test_other_models_are_refused():
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    with pytest.raises(sgfx.InputError, match="no regrouped layers"):
        sgfx.calibrate(dense, dense, images())
    with pytest.raises(sgfx.InputError, match="layer 'stem' of small is not in dense"):
        sgfx.calibrate(nn.Sequential(nn.Conv2d(3, 8, 3)), small, images())
    with pytest.raises(sgfx.InputError, match="dense has been compiled itself: give the model from before"):
        sgfx.calibrate(small, small, images())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        sgfx.calibrate(dense, "small", images())


def test_data_that_a_model_works_on_in_place_stays_as_it_was():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

        def forward(self, x):
            x.sub_(0.5)
            return self.part(x) if float(x.sum()) > -1e9 else x

    dense, images = Branching().eval(), torch.randn(64, 3, 9, 9)
    small = sgfx.compile(dense, groups=4, ratio=0.5, example_inputs=(images[:1].clone(),))
    before = images.clone()
    sgfx.calibrate(dense, small, images)
    assert torch.equal(images, before)


def test_examples_that_a_model_works_on_in_place_stay_as_they_were():
    class Shifting(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    model, images = Shifting(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval(), torch.randn(32, 3, 9, 9)
    before = images.clone()
    small = sgfx.compile(model, groups=4, budget={"macs": 0.6}, calibration=images)
    sgfx.report(model, small, images)
    assert torch.equal(images, before)


def test_few_factors_at_a_time_give_the_same_weights(monkeypatch):
    dense = made(Residual())
    at_once = sgfx.compile(dense, groups=4, ratio=0.5, calibration=images(16))
    for limit in (0, 2 * 8 * 36**2):
        monkeypatch.setattr("passes.calibration.layer_solver.FACTOR_BYTES", limit)
        few = sgfx.compile(dense, groups=4, ratio=0.5, calibration=images(16))
        for name, tensor in at_once.state_dict().items():
            torch.testing.assert_close(few.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)
