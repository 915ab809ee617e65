"""The coverage sweep over its small networks, and the oracle it rests on, which must see every kind of mistake."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sgfx
from benchmarks.coverage_cases import TIMM, case, family_of, names
from benchmarks.coverage_examination import examine
from tests.tools.oracle import Layout, compare, mask, prepare, run

SMALL = (
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "googlenet",
    "ssdlite320_mobilenet_v3_large",
    "raft_small",
)
X = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_equal_the_masked_ones(name):
    found = examine(case(name))
    assert found["status"] == "exact", found["differences"]
    assert found["achieved"] == pytest.approx(0.5, abs=0.005)
    assert found["regrouped"] > 0.6 * found["layers"]
    assert found["reached"] > 0.8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["quantized_shufflenet_v2_x0_5", "quantized_resnet18"])
def test_quantized_networks_are_refused(name):
    with pytest.raises(sgfx.InputError, match="is quantized; compile the floating-point model, then quantize it"):
        examine(case(name))


def test_the_sweep_knows_every_network():
    assert len(names(timm=False)) >= 121
    assert len(TIMM) == len(set(TIMM)) >= 40
    assert {family_of(name) for name in names(timm=False)} == {
        "classification",
        "segmentation",
        "detection",
        "video",
        "optical flow",
        "quantized",
    }


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Dropout(0.5), nn.Conv2d(6, 4, 1)
    return prepare(nn.Sequential(*layers).double())


def found(dense, small, training):
    masked = mask(copy.deepcopy(dense), small)
    return compare(run(masked, (X,), training=training), run(small, (X,), training=training), small, {})


def test_the_oracle_prepares_a_network():
    model = net()
    assert model[4].p == 0.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dim() == 0 or tensor.unique().numel() == tensor.numel(), name


def shift(name):
    def spoil(small):
        small.get_parameter(name).data.flatten()[0] += 1e-3

    return spoil


def shift_statistics(small):
    small[1].running_mean[2] += 1e-3


def lose_gradient(small):
    small[3].weight.register_hook(lambda gradient: gradient * (1 + 1e-6))


def swap_plan(small):
    small[3].__dict__["_sgfx_plan"] = sgfx.plans(sgfx.compile(net(), groups=3, ratio=0.4))["3"]


@pytest.mark.parametrize(
    ("spoil", "modes"),
    [
        (shift("0.weight"), (False, True)),
        (shift("3.weight"), (False, True)),
        (shift("5.bias"), (False, True)),
        (shift_statistics, (False,)),
        (lose_gradient, (True,)),
    ],
)
def test_the_oracle_sees_mistakes(spoil, modes):
    dense = net()
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    for training in (False, True):
        assert found(dense, small, training).largest < 1e-12
    for training in modes:
        spoilt = copy.deepcopy(small)
        spoil(spoilt)
        assert found(dense, spoilt, training).largest > 1e-8


def test_the_oracle_sees_a_wrong_plan():
    dense = net()
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    swap_plan(small)
    assert found(dense, small, training=False).outputs > 1e-3


def test_where_the_entries_of_a_cut_layer_lie():
    plan = SimpleNamespace(
        out_channels=4,
        labels=torch.tensor([1, 0, 1, 0]),
        keep=torch.tensor([[True, True, False], [False, True, True]]),
    )
    layout = Layout(
        nn.Sequential(nn.Conv2d(3, 4, 1)), {"0": SimpleNamespace(outputs=torch.tensor([0, 1, 2]), inputs=None)}
    )
    layout.plans = {"0": plan}
    weight = torch.arange(12.0).view(4, 3, 1, 1)
    kept, rest = layout.split("0.weight", weight)
    assert kept.flatten().tolist() == [3, 4, 1, 2, 7, 8]  # filter 1 of group 0, then filters 0 and 2 of group 1
    assert rest.tolist() == [9, 10]  # filter 3, of which connections 0 and 1 are kept
    kept, rest = layout.split("0.bias", torch.arange(4.0))
    assert (kept.tolist(), rest.tolist()) == ([0, 1, 2], [3])
    layout.cuts = {"0": SimpleNamespace(outputs=None, inputs=torch.tensor([1, 2]))}
    kept, rest = layout.split("0.weight", weight)
    assert kept.flatten().tolist() == [4, 10, 1, 2, 7, 8]
    assert rest.tolist() == [3, 9]


def test_something_eliminated_must_have_had_no_gradient():
    dense = net()
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    masked = run(mask(copy.deepcopy(dense), small), (X,), training=True)
    cut = {"5": SimpleNamespace(outputs=torch.tensor([0, 1]), inputs=None)}
    with pytest.raises(AssertionError, match=r"5\.weight was eliminated in part, where its gradient is not zero"):
        compare(masked, run(small, (X,), training=True), small, cut)
