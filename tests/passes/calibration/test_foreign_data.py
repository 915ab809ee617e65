"""What norms see against what they have learnt, and the warning of foreign images."""

import math
import warnings

import pytest
import torch
from torch import nn

import sgfx
from passes.calibration.foreign_data import divergence, seen_by_norms


def images(count, seed=0, scale=1.0, shift=0.0):
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return scale * noise + shift


class Net(nn.Module):
    """Norms behind a first and a second convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)).relu()))


@pytest.fixture
def trained():
    """A network whose norms have learnt the statistics of normal noise."""
    torch.manual_seed(0)
    model = Net()
    for norm in (model.norm, model.last):
        norm.momentum = None  # a plain average over all batches
    for seed in range(8):
        model(images(64, seed))
    return model.eval()


def test_the_divergence_is_that_of_normal_distributions():
    """Against the integral of p · ln(p / q)."""
    x = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    for mean, variance, other, spread in ((0.3, 2.0, -0.5, 1.5), (0.0, 0.25, 0.0, 1.0), (2.0, 1.0, 0.0, 4.0)):
        p, q = (
            torch.distributions.Normal(torch.tensor(m, dtype=torch.float64), v**0.5).log_prob(x)
            for m, v in ((mean, variance), (other, spread))
        )
        expected = float((p.exp() * (p - q)).sum() * (x[1] - x[0]))
        found = divergence(*(torch.tensor(v, dtype=torch.float64) for v in (mean, variance, other, spread)))
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_what_a_norm_sees_is_measured_over_all_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    model[0].running_mean.copy_(torch.tensor([0.0, 1.0, 2.0]))
    model[0].running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    x = torch.randn(40, 3, 2, 2, dtype=torch.float64) * 3 + 1
    (seen,) = seen_by_norms(model, [(x[:1],), (x[1:20],), (x[20:],)])
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0) + 1e-5
    learnt, spread = model[0].running_mean, model[0].running_var + 1e-5
    assert seen.path == "0"
    assert seen.divergence == pytest.approx(float(divergence(mean, variance, learnt, spread).mean()), rel=1e-9)
    assert seen.shift == pytest.approx(float(((mean - learnt) ** 2 / spread).mean().sqrt()), rel=1e-9)
    assert seen.spread == pytest.approx(math.exp(float((variance / spread).log().mean())), rel=1e-9)
    assert seen_by_norms(model, [(x[:4],)]) == []  # too few values


def test_norms_that_have_learnt_nothing_say_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False))
    assert seen_by_norms(model, [(images(32, shift=9),)]) == []
    assert seen_by_norms(model, [(torch.zeros(8, 5, 2, 2),)]) == []


def test_own_images_are_no_cause_for_a_warning(trained):
    small = sgfx.compile(trained, groups=2, ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (32, 100):
            sgfx.calibrate(trained, small, images(count, seed=99))


@pytest.mark.parametrize(
    "foreign", [{"shift": 2.0}, {"scale": 0.3}, {"scale": 255.0, "shift": 128.0}], ids=["other", "pale", "bytes"]
)
def test_foreign_images_are_said_once_wherever_they_come_in(trained, foreign):
    message = r"2 norms see other statistics .* divergence of \d.* Worst is '(norm|last)': means .* off, variances"
    data = images(64, seed=99, **foreign)
    fired = []
    trained.norm.register_forward_hook(lambda *_: fired.append(1))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    for call in (
        lambda: sgfx.calibrate(trained, sgfx.compile(trained, groups=2, ratio=0.5), data),
        lambda: sgfx.compile(trained, groups=2, ratio=0.5, calibration=data),
        lambda: sgfx.compile(trained, groups=2, budget={"params": 0.8}, calibration=data),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]
    assert fired == []
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
