"""Calls by keyword, submodules named by Python keywords, recurrent layers: all compiled like the same call plainly."""

import keyword
import pickle
import time

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.tracing.shapes import find_shapes
from passes.tracing.trace import trace

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# Each pair computes the same from `x` of 8 channels; the first calls by position, the second by keyword.
WAYS = {
    "conv": (lambda m, x: m.conv(x), lambda m, x: m.conv(input=x)),
    "conv, norm": (lambda m, x: m.norm(m.conv(x)), lambda m, x: m.norm(input=m.conv(input=x))),
    "relu module": (lambda m, x: m.act(m.conv(x)), lambda m, x: m.act(input=m.conv(input=x))),
    "identity": (lambda m, x: m.same(x), lambda m, x: m.same(input=x)),
    "pool module": (lambda m, x: m.pool(x), lambda m, x: m.pool(input=x)),
    "sequential": (lambda m, x: m.body(x), lambda m, x: m.body(input=x)),
    "linear": (
        lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda m, x: m.linear(input=x.permute(dims=(0, 2, 3, 1))).permute(dims=(0, 3, 1, 2)),
    ),
    "attention": (
        lambda m, x: m.attention(*[x.flatten(2)] * 3, None, False)[0].view(2, 8, 8, 8),
        lambda m, x: m.attention(key=x.flatten(2), query=x.flatten(2), value=x.flatten(2), need_weights=False)[0].view(
            size=(2, 8, 8, 8)
        ),
    ),
    "cat": (
        lambda m, x: m.wide(torch.cat([x, m.conv(x)], 1)),
        lambda m, x: m.wide(torch.cat(tensors=[x, m.conv(x)], dim=1)),
    ),
    "cat, growing": (
        lambda m, x: m.wider(torch.cat([torch.cat([x, m.conv(x)], 1), x], 1)),
        lambda m, x: m.wider(torch.cat(tensors=(torch.cat(dim=1, tensors=(x, m.conv(x))), x), axis=1)),
    ),
    "stack": (lambda m, x: torch.stack([x, x], 1)[:, 0], lambda m, x: torch.stack(tensors=[x, x], dim=1)[:, 0]),
    "add": (lambda m, x: torch.add(x, m.conv(x)), lambda m, x: torch.add(input=x, other=m.conv(x))),
    "add, method": (lambda m, x: x.add(m.conv(x)), lambda m, x: x.add(other=m.conv(x))),
    "add, scaled": (lambda m, x: x + 2 * m.conv(x), lambda m, x: torch.add(input=x, other=m.conv(x), alpha=2)),
    "multiply": (lambda m, x: torch.mul(x, m.conv(x)), lambda m, x: torch.mul(other=m.conv(x), input=x)),
    "relu": (lambda m, x: F.relu(m.conv(x)), lambda m, x: F.relu(input=m.conv(x))),
    "relu in place": (lambda m, x: F.relu(m.conv(x), True), lambda m, x: F.relu(inplace=True, input=m.conv(x))),
    "hardtanh": (lambda m, x: F.hardtanh(x, 0.0, 1.0), lambda m, x: F.hardtanh(input=x, max_val=1.0, min_val=0.0)),
    "clamp": (lambda m, x: x.clamp(None, 1), lambda m, x: torch.clamp(input=x, max=1)),
    "dropout": (lambda m, x: F.dropout(x, 0.5, False), lambda m, x: F.dropout(input=x, training=False)),
    "max pool": (
        lambda m, x: F.max_pool2d(x, 3, 1, 1),
        lambda m, x: F.max_pool2d(input=x, kernel_size=3, stride=1, padding=1),
    ),
    "average pool": (
        lambda m, x: F.avg_pool2d(x, 3, 1, 1),
        lambda m, x: F.avg_pool2d(input=x, kernel_size=3, padding=1, stride=1),
    ),
    "adaptive pool": (
        lambda m, x: F.adaptive_avg_pool2d(x, 4),
        lambda m, x: F.adaptive_avg_pool2d(output_size=4, input=x),
    ),
    "interpolate": (lambda m, x: F.interpolate(x, None, 2), lambda m, x: F.interpolate(input=x, scale_factor=2)),
    "pad": (lambda m, x: F.pad(x, (1, 1)), lambda m, x: F.pad(input=x, pad=(1, 1))),
    "pad channels": (
        lambda m, x: m.wide(F.pad(x, (0, 0, 0, 0, 4, 4), "constant", 1.0)),
        lambda m, x: m.wide(F.pad(pad=(0, 0, 0, 0, 4, 4), input=x, value=1.0)),
    ),
    "mean": (lambda m, x: x * x.mean((2, 3), True), lambda m, x: x * x.mean(dim=(2, 3), keepdim=True)),
    "mean, as numpy": (
        lambda m, x: x * x.mean((2, 3), True),
        lambda m, x: x * torch.mean(x, axis=(2, 3), keepdims=True),
    ),
    "sum": (lambda m, x: x * torch.sum(x, 1, True), lambda m, x: x * torch.sum(input=x, dim=1, keepdim=True)),
    "softmax": (lambda m, x: F.softmax(x, -1), lambda m, x: F.softmax(input=x, dim=-1)),
    "softmax, method": (lambda m, x: x.softmax(1), lambda m, x: x.softmax(dim=1)),
    "flatten": (
        lambda m, x: torch.flatten(x, 2).view(2, 8, 8, 8),
        lambda m, x: torch.flatten(input=x, start_dim=2).view(size=(2, 8, 8, 8)),
    ),
    "reshape": (lambda m, x: x.reshape(2, -1, 4, 16), lambda m, x: x.reshape(shape=(2, -1, 4, 16))),
    "transpose": (lambda m, x: x.transpose(2, 3), lambda m, x: x.transpose(dim0=2, dim1=3)),
    "chunk": (lambda m, x: m.four(x.chunk(2, 1)[0]), lambda m, x: m.four(x.chunk(dim=1, chunks=2)[0])),
    "split": (lambda m, x: m.four(x.split(4, 1)[1]), lambda m, x: m.four(x.split(split_size=4, dim=1)[1])),
    "narrow": (lambda m, x: m.four(x.narrow(1, 2, 4)), lambda m, x: m.four(x.narrow(dim=1, start=2, length=4))),
    "unbind": (lambda m, x: torch.stack(x.unbind(1), 1), lambda m, x: torch.stack(torch.unbind(input=x, dim=1), dim=1)),
    "expand": (lambda m, x: x[:, :1].expand(-1, 8, -1, -1), lambda m, x: x[:, :1].expand(size=(-1, 8, -1, -1))),
    "size": (lambda m, x: x * x.size(1), lambda m, x: x * x.size(dim=1)),
    "where": (
        lambda m, x: torch.where(x > 0, x, 0.1 * x),
        lambda m, x: torch.where(input=x, condition=x > 0, other=0.1 * x),
    ),
    "functional": (lambda m, x: F.conv2d(x, m.conv.weight), lambda m, x: F.conv2d(weight=m.conv.weight, input=x)),
    "stochastic depth": (
        lambda m, x: torchvision.ops.stochastic_depth(x, 0.5, "row", False),
        lambda m, x: torchvision.ops.stochastic_depth(input=x, mode="row", p=0.5, training=False),
    ),
}  # fmt: skip


class Net(nn.Module):
    """Some layers before and behind a call."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.act, self.same, self.pool = nn.BatchNorm2d(8), nn.ReLU(), nn.Identity(), nn.MaxPool2d(2)
        self.wide, self.wider, self.four = nn.Conv2d(16, 8, 1), nn.Conv2d(24, 8, 1), nn.Conv2d(4, 8, 1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.linear, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(64, 2, batch_first=True)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.call(self, self.stem(x)))


def forms(call):
    """Everything that is made of a net: compiled, eliminated, calibrated and frozen."""
    torch.manual_seed(0)
    net = Net(call).double()
    options = {"groups": 2, "ratio": 0.8, "example_inputs": IMAGES}
    small = sgfx.compile(net, **options)
    fewer = sgfx.compile(net, eliminate=True, **options)
    calibrated = sgfx.compile(net, calibration=IMAGES, **options)
    return [small, fewer, calibrated, sgfx.freeze(small, IMAGES, strategy="library")]


@pytest.mark.filterwarnings("ignore:not calibrated")
@pytest.mark.parametrize("name", WAYS)
def test_calls_by_keyword_are_those_by_position(name):
    plain, by_keyword = ([*forms(call)] for call in WAYS[name])
    for a, b in zip(plain, by_keyword, strict=True):
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
        for each in (a, b):
            each.eval()
        torch.testing.assert_close(b(IMAGES), a(IMAGES), rtol=1e-12, atol=1e-12)
    assert sgfx.plans(plain[0]).keys() == sgfx.plans(by_keyword[0]).keys()


class Named(nn.Module):
    """Submodules, parameters and buffers with the names of Python keywords, beside names that begin alike."""

    def __init__(self):
        super().__init__()
        self.add_module("in", nn.Conv2d(3, 8, 3, padding=1))
        self.inside = nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleDict({"class": nn.Conv2d(8, 8, 1), "0": nn.ModuleDict({"is": nn.BatchNorm2d(8)})})
        self.register_parameter("lambda", nn.Parameter(torch.rand(8, 1, 1)))
        self.blocks.register_buffer("not", torch.rand(8, 1, 1))

    def forward(self, x):
        x = self.inside(getattr(self, "in")(x))
        x = self.blocks["0"]["is"](self.blocks["class"](x)).relu() * getattr(self, "lambda")
        return x + getattr(self.blocks, "not")


@pytest.mark.parametrize("eliminate", [False, True])
def test_submodules_named_by_python_keywords(eliminate, tmp_path):
    torch.manual_seed(0)
    net = Named().double()
    small = sgfx.compile(net, groups=2, ratio=0.5, example_inputs=IMAGES, eliminate=eliminate, calibration=IMAGES)
    assert {path for path, plan in sgfx.plans(small).items() if plan.grouped} == {"inside", "blocks.class"}
    expected = small.eval()(IMAGES)
    frozen = sgfx.freeze(small, IMAGES, strategy="library")
    assert {"in", "blocks.class"} <= frozen.decisions.layers.keys()
    for each in (frozen, pickle.loads(pickle.dumps(frozen))):
        torch.testing.assert_close(each(IMAGES), expected, rtol=1e-12, atol=1e-12)
    names = [name for path, _ in frozen.named_modules() for name in path.split(".")]
    assert not any(map(keyword.iskeyword, names))
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=Named().double()).eval()
    torch.testing.assert_close(loaded(IMAGES), expected)


def test_they_are_exported_under_other_names(tmp_path):
    pytest.importorskip("onnxscript")
    small = sgfx.compile(Named(), groups=2, ratio=0.5)
    for file in ("small.onnx", "small.pt2"):  # which are run and compared as they are written
        assert sgfx.export(small, tmp_path / file, IMAGES.float()).max_difference < 1e-5
    assert "blocks.not_" in torch.export.load(tmp_path / "small.pt2").state_dict


class Reader(nn.Module):
    """A recurrent layer that reads every pixel behind convolutions."""

    def __init__(self, kind, **options):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        self.reader = kind(8, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else options.get("proj_size", 6), 5)

    def forward(self, x):
        return self.head(self.reader(self.features(x).flatten(2).transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_behind_convolutions_take_no_time(kind):
    start = time.process_time()
    small = sgfx.compile(Reader(kind), groups=2, ratio=0.5, eliminate=True)
    assert time.process_time() - start < 5  # step by step it would be minutes
    assert sgfx.plans(small)["features.1"].grouped


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 4}, {"num_layers": 2}])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 8), (5, 8)])
def test_the_shapes_of_recurrent_layers(options, batch_first, shape):
    layer = nn.LSTM(8, 6, batch_first=batch_first, **options)
    graph = trace(nn.Sequential(layer), (torch.zeros(shape),)).graphs["eval"]
    output, (hidden, cell) = next(node for node in graph.graph.nodes if node.op == "call_module").meta["val"]
    y, (h, c) = layer(torch.zeros(shape))
    assert (output.shape, hidden.shape, cell.shape) == (y.shape, h.shape, c.shape)


def long_loop(x):
    for _ in range(x.shape[2]):
        x = x * 1.0 + 0.0
    return x


torch.fx.wrap("long_loop")


def test_guesses_are_given_up_where_they_cost_much():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return long_loop(self.conv(x).flatten(2))

    graph = trace(Loop()).graphs["eval"]
    start = time.process_time()
    assert not find_shapes(graph, None)
    assert time.process_time() - start < 5  # the 100,000 operations of the first guess would be more
    assert find_shapes(graph, (torch.zeros(2, 3, 20, 20),))  # whoever gives inputs gets what they lead to
