"""Numbers that can't be computed with: a message that names the layer, and nothing half-done."""

import pytest
import torch
from torch import nn

import sgfx


class Inside(nn.Module):
    """A part of a model that can't be traced whole."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, x):
        return self.body(x) if float(x.sum()) else self.body(x) + 1


def made(dtype, factor):
    torch.manual_seed(0)
    model = Inside().to(dtype)
    model.body[0].weight.data.mul_(factor)
    return model


def images(dtype):
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 3e38), (torch.float64, 1e160), (torch.float16, 6e4), (torch.bfloat16, 3e38)],
)
def test_activations_that_overflow_name_the_layer(dtype, factor):
    dense, data = made(dtype, factor), images(dtype)
    message = r"layer 'body\.2' reads or yields NaN or infinite values on the data, or ones too large to be squared"
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.calibrate(dense, small, data)
    assert all(
        torch.equal(value, before[name]) for name, value in small.state_dict().items() if value.is_floating_point()
    )
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.compile(dense, groups=2, ratio=0.5, calibration=data)
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.compile(dense, groups=2, budget={"params": 0.6}, calibration=data)


def test_large_numbers_that_do_not_overflow_are_no_matter():
    """The same network in other units: what is solved is the same too."""
    dense, data = made(torch.float64, 1.0), images(torch.float64)
    scaled = made(torch.float64, 1e100)
    scaled.body[0].bias.data.mul_(1e100)
    scaled.body[2].weight.data.mul_(1e-100)
    one, other = (sgfx.compile(each, groups=2, ratio=0.5, calibration=data) for each in (dense, scaled))
    torch.testing.assert_close(one(data), other(data), rtol=1e-9, atol=1e-9)


class Chosen(nn.Module):
    """A head that sees what is bright, and there may be nothing."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.stem(x[:0]))


def test_a_layer_that_reads_nothing_keeps_its_weights():
    torch.manual_seed(0)
    dense = Chosen()
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = small.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="not calibrated, since they read nothing or no traced .*: stem, head"):
        sgfx.calibrate(dense, small, torch.randn(8, 4))
    assert torch.equal(small.head.weight, before)
    with pytest.raises(sgfx.InputError, match="'stem' is in none, or reads nothing there"):
        sgfx.compile(dense, groups=2, budget={"params": 0.6}, calibration=torch.randn(8, 4))
