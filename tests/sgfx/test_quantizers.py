"""Quantizers work on compiled models: torchao's pt2e flow, and torch's `prepare_fx` while it has it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.layers.grouped import Grouped

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def images(count=4, size=64, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def in_form(model, form):
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, Grouped):
            layer.form = form
    return twin


def compiled(dense, x, groups=4):
    """With statistics of norms that fit."""
    norms = [module for module in dense.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        dense.train()(x)
    return sgfx.compile(dense.eval(), groups=groups, ratio=0.5)


class Block(nn.Module):
    """A stem and a residual block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def relative_error(quantized, model, x):
    """Of all outputs together, in the Euclidean norm."""
    with torch.no_grad():
        expected = model(x)
        return float((quantized(x) - expected).norm() / expected.norm())


def by_pt2e(model, x):
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    with torch.no_grad():
        prepared(x)
    return convert_pt2e(prepared)


def int8_weights(graph):
    """How many weights became int8."""
    return sum(tensor.dtype == torch.int8 for tensor in graph.state_dict().values())


def by_fx(model, x):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    with torch.no_grad():
        prepared(x)
    return quantize_fx.convert_fx(prepared)


def test_torchao_quantizes_every_regrouped_layer():
    """With strict tracing: else its quantizer knows convolutions by their class, and leaves regrouped ones alone."""
    torch.manual_seed(0)
    x = images(16, 8)
    small = compiled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), x, 2)
    quantized = by_pt2e(small, x)
    assert int8_weights(quantized) == 2
    assert relative_error(quantized, small, x) < 2e-2


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the engine x86")
@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_prepare_fx_quantizes_every_regrouped_layer(form):
    torch.manual_seed(0)
    x = images(16, 16)
    dense = Block()
    small = in_form(compiled(dense, x), form)
    quantized = by_fx(small, x)
    called = [node.target for node in quantized.graph.nodes if node.op == "call_function"]
    assert F.conv2d not in called
    assert F.linear not in called
    assert relative_error(quantized, small, x) < relative_error(by_fx(dense, x), dense, x) < 4e-2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(8, 8, 3), (4, 8, 9)), (nn.Conv3d(8, 8, 3), (2, 8, 5, 5, 5)), (nn.Linear(8, 8), (4, 8))],
)
@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_other_layers(layer, shape, form):
    torch.manual_seed(0)
    x = torch.randn(shape)
    dense = nn.Sequential(layer).eval()
    small = in_form(sgfx.compile(dense, groups=2, ratio=0.5, overrides={"0": {"ratio": 0.5}}), form)
    assert isinstance(small[0], Grouped)
    quantized = by_fx(small, x)
    assert not {F.conv1d, F.conv3d, F.linear} & {node.target for node in quantized.graph.nodes}
    assert relative_error(quantized, small, x) < 1.5 * relative_error(by_fx(dense, x), dense, x) < 4e-2


def test_a_group_without_inputs_can_be_traced_and_gives_its_bias():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 8, 1))
    dense[0].weight.data[:4] *= 1e-3
    options = {"groups": 2, "ratio": 0.6, "overrides": {"0": {"ratio": 0.6}}}
    small = in_form(sgfx.compile(dense, **options), "blocks")
    assert 0 in [inputs for _, inputs in small[0].block_sizes.tolist()]
    x = torch.randn(2, 8, 3, 3)
    traced = torch.fx.Tracer().trace(small[0])
    graph = torch.fx.GraphModule(small[0], traced)
    torch.testing.assert_close(graph(x), in_form(small, "dense")(x))
