"""Multiply-adds against closed forms, by both counters: one network has one number, however it is written."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.ops import deform_conv2d

import sgfx
from sgfx.reporting import counting
from sgfx.reporting.counting import count_macs

N, H, L, S, E, V = 2, 3, 5, 7, 4, 6  # examples, heads, queries, keys, their size, and that of values
ATTENTION = N * H * L * S * (E + V)


class Calls(nn.Module):
    """Calls a function with its inputs, and with the modules that it holds."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.held = function, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.function(*self.held, *inputs)


def sized(*shapes):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]


def by_both(model, *inputs):
    """The totals that fvcore and torch's counter come to, each without the other."""
    found = []
    for other in ("_counted_by_torch", "_counted_by_fvcore"):
        with mock.patch.object(counting, other, side_effect=NotImplementedError):
            found.append(count_macs(model, inputs)[""])
    assert found[0] == found[1]
    return found[0]


def by_einsum(q, k, v):
    return torch.einsum("...ls,...sv->...lv", torch.einsum("nhle,nhse->nhls", q, k).softmax(-1), v)


def by_bmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.baddbmm(torch.zeros(N * H, L, S), q, k.transpose(1, 2)).softmax(-1), v)


@pytest.mark.parametrize(
    "attend",
    [
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(L, S) > 0),
        lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
        by_einsum,
        by_bmm,
    ],
)
def test_attention_is_its_two_products(attend):
    assert by_both(Calls(attend), *sized((N, H, L, E), (N, H, S, E), (N, H, S, V))) == ATTENTION


@pytest.mark.parametrize(
    ("heads", "options"), [(3, {}), (3, {"is_causal": True}), (1, {"enable_gqa": True}), (3, {"scale": 0.1})]
)
def test_attention_with_values_as_wide_as_keys(heads, options):
    """The one that torch has a kernel of its own for on the CPU."""
    model = Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    assert by_both(model, *sized((N, 3, L, E), (N, heads, L, E), (N, heads, L, E))) == N * 3 * L * L * 2 * E


@pytest.mark.parametrize(
    "options", [{}, {"need_weights": False}, {"attn_mask": torch.zeros(L, L)}, {"key_padding_mask": torch.zeros(N, L)}]
)
def test_attention_of_torch_and_a_layer_around_it(options):
    """What torch fuses in eval mode; the four projections, and queries, keys and values of 8 numbers in all."""
    attention = N * L * 8 * 4 * 8 + 2 * N * L * L * 8
    model = Calls(lambda layer, x: layer(x, x, x, **options)[0], nn.MultiheadAttention(8, 2, batch_first=True))
    assert by_both(model, *sized((N, L, 8))) == attention
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    assert by_both(model, *sized((N, L, 8))) == 3 * (attention + 2 * N * L * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_vision_transformer():
    model = VisionTransformer(32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=7)
    tokens = 4 * 4 + 1
    layer = tokens * 12 * (4 * 12 + 2 * 20) + 2 * tokens**2 * 12
    assert by_both(model, *sized((N, 3, 32, 32))) == N * (16 * 3 * 64 * 12 + 2 * layer + 12 * 7)


STEPS = 5 * 2  # of two sequences


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("model", "shapes", "expected"),
    [
        (Calls(torch.mv), [(3, 4), (4,)], 12),
        (Calls(torch.matmul), [(2, 3, 4), (4,)], 24),
        (Calls(torch.matmul), [(3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (Calls(torch.dot), [(4,), (4,)], 4),
        (Calls(torch.addbmm), [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (Calls(torch.addmv), [(3,), (3, 4), (4,)], 12),
        (Calls(lambda a, b: torch.tensordot(a, b, 2)), [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
        (Calls(torch.inner), [(2, 3), (4, 3)], 24),
        (Calls(lambda a: torch.einsum("nchw->nhwc", a)), [(2, 3, 4, 5)], 0),
        (Calls(lambda a, b: torch.einsum("nc,nc->nc", a, b)), [(2, 3), (2, 3)], 0),
        (Calls(lambda a, b: torch.einsum("nchw,kc", a, b)), [(2, 3, 4, 5), (6, 3)], 2 * 3 * 4 * 5 * 6),
        (nn.Bilinear(3, 5, 4), [(2, 3), (2, 5)], 2 * 4 * 5 * (3 + 1)),
        (nn.Conv2d(3, 4, 3, padding="same"), [(2, 3, 5, 5)], 2 * 4 * 27 * 25),
        (nn.Conv2d(3, 4, 3), [(3, 5, 5)], 4 * 27 * 9),
        (nn.Conv3d(4, 6, 3, groups=2), [(1, 4, 5, 5, 5)], 6 * 54 * 27),
        (nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2), [(2, 6, 5, 5)], 2 * 6 * 25 * 2 * 9),
        (Calls(torch.conv_tbc), [(6, 2, 4), (3, 4, 5), (5,)], 4 * 2 * 5 * 12),
        (Calls(deform_conv2d), [(2, 3, 5, 5), (2, 18, 3, 3), (4, 3, 3, 3)], 2 * 4 * 27 * 9),
        (nn.LSTM(3, 4, 2, bidirectional=True), [(5, 2, 3)], STEPS * 2 * (16 * (3 + 4) + 16 * (8 + 4))),
        (nn.LSTM(3, 4, proj_size=2), [(5, 2, 3)], STEPS * (16 * (3 + 2) + 4 * 2)),
        (nn.GRU(3, 4, batch_first=True), [(2, 5, 3)], STEPS * 12 * (3 + 4)),
        (nn.RNN(3, 4), [(5, 2, 3)], STEPS * 4 * (3 + 4)),
        (nn.GRUCell(3, 4), [(2, 3)], 2 * 12 * (3 + 4)),
    ],
)
def test_products_and_convolutions_of_every_kind(model, shapes, expected):
    assert by_both(model, *sized(*shapes)) == expected


def test_products_whose_cost_depends_on_their_order_are_counted_as_they_run():
    chain = Calls(lambda a, b, c: torch.linalg.multi_dot([a, b, c]))
    assert count_macs(chain, tuple(sized((2, 3), (3, 4), (4, 1))))[""] == 3 * 4 + 2 * 3


class Attends(nn.Module):
    """Two linear layers around attention, which is called in one of two ways."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.into, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.into(x).chunk(3, -1)
        return self.out(self.attend(q, k, v))


def test_reports_budgets_and_frozen_models_count_attention():
    (x,) = sized((2, 16, 8))
    linear, attention = 2 * 16 * 8 * 32, 2 * 2 * 16 * 16 * 8
    for attend in (F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v):
        torch.manual_seed(0)
        dense = Attends(attend)
        report = sgfx.report(dense, sgfx.compile(dense, groups=2, ratio=0.5), x)
        assert report.macs_dense == linear + attention
        kept = sum(layer.macs for layer in report.layers)
        assert report.macs_removed.achieved == 1 - (kept + attention) / (linear + attention)
        small = sgfx.compile(dense, groups=2, budget={"macs": 0.8}, calibration=x, example_inputs=x)
        assert sgfx.report(dense, small, x).macs == pytest.approx(0.8 * (linear + attention), rel=0.02)
        assert count_macs(sgfx.freeze(small, x, strategy="library"), (x,))[""] == sgfx.report(dense, small, x).macs
        with pytest.raises(sgfx.InputError, match=r"budget of 0.3 of all macs can't be kept"):
            sgfx.compile(dense, groups=2, budget={"macs": 0.3}, calibration=x)
