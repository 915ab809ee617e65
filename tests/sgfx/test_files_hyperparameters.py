"""`sgfx.load` into a model that differs in hyperparameters alone, or in what is no hyperparameter."""

import enum
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.ops import StochasticDepth

import sgfx
from passes.layers.channel_cut import cuts
from passes.models.record import describe
from tests.sgfx.test_files import Net, eliminated_net
from tests.sgfx.test_files_refused import refused, rewrite

X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A layer that is regrouped, and a module after it."""

    def __init__(self, inner):
        super().__init__()
        self.stem, self.conv, self.inner = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), inner

    def forward(self, x):
        return self.inner(self.conv(self.stem(x)))


def saved(path, model):
    torch.manual_seed(0)
    sgfx.save(sgfx.compile(model, groups=2, ratio=0.5, example_inputs=X), path)
    return path


def outputs(module, train):
    torch.manual_seed(0)
    x = X.clone()
    y = module.train(train)(x)
    y = y[0] if isinstance(y, tuple) else y
    return [y, x, *(buffer.double() for buffer in module.buffers())]


PAIRS = [
    (lambda: nn.LeakyReLU(0.2), nn.LeakyReLU, "negative_slope 0.2 in the file and 0.01 in the model"),
    (lambda: nn.ReLU(inplace=True), nn.ReLU, "inplace True in the file and False"),
    (lambda: nn.Hardtanh(0, 1), nn.Hardtanh, "min_val 0 in the file and -1.0"),
    (lambda: nn.Hardtanh(-float("inf"), 0.1), lambda: nn.Hardtanh(-1.0, 0.1), "min_val -inf in the file"),
    (nn.GELU, lambda: nn.GELU("tanh"), "approximate none in the file and tanh"),
    (lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(4, 8), "num_groups 2 in the file and 4"),
    (lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(2, 8, eps=0.1), "eps 1e-05 in the file and 0.1"),
    (lambda: nn.BatchNorm2d(8), lambda: nn.BatchNorm2d(8, momentum=None), "momentum 0.1 in the file and None"),
    (lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(scale_factor=3), r"scale_factor 2.0 in the file and 3.0"),
    (lambda: nn.Upsample(None, 2, "bilinear"), lambda: nn.Upsample(None, 2, "bicubic"), "mode bilinear in the file"),
    (
        lambda: nn.Upsample(None, 2, "bilinear", True),
        lambda: nn.Upsample(None, 2, "bilinear"),
        "align_corners True in the file and None",
    ),
    (
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        "count_include_pad True in the file and False",
    ),
    (
        lambda: nn.AdaptiveAvgPool2d(1),
        lambda: nn.AdaptiveAvgPool2d((2, None)),
        r"output_size 1 in the file and \[2, No",
    ),
    (lambda: nn.Softmax(1), lambda: nn.Softmax(-1), "dim 1 in the file and -1"),
    (lambda: nn.Dropout(0.5), lambda: nn.Dropout(0.1), "p 0.5 in the file and 0.1"),
    (nn.Flatten, lambda: nn.Flatten(2), "start_dim 1 in the file and 2"),
    (lambda: nn.PixelShuffle(2), lambda: nn.PixelShuffle(1), "upscale_factor 2 in the file and 1"),
    (lambda: nn.LayerNorm(4, elementwise_affine=False), lambda: nn.LayerNorm((4, 4), elementwise_affine=False), "norm"),
    (lambda: nn.ConstantPad2d(1, 0.0), lambda: nn.ConstantPad2d(1, 1.0), "value 0.0 in the file and 1.0"),
    (lambda: nn.ZeroPad2d(1), lambda: nn.ZeroPad2d(2), r"padding \[1, 1, 1, 1\] in the file"),
    (
        lambda: nn.ConvTranspose2d(8, 8, 2, 2),
        lambda: nn.ConvTranspose2d(8, 8, 2, 2, output_padding=1),
        r"output_padding \[0, 0\] in the file and \[1, 1\]",
    ),
    (
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
        "padding_mode zeros in the file and reflect",
    ),
    (lambda: nn.LocalResponseNorm(2, k=2.0), lambda: nn.LocalResponseNorm(2), "k 2.0 in the file and 1.0"),
    (lambda: nn.Embedding(9, 3, max_norm=1.0), lambda: nn.Embedding(9, 3), "max_norm 1.0 in the file and None"),
    (lambda: StochasticDepth(0.5, "row"), lambda: StochasticDepth(0.1, "row"), "p 0.5 in the file and 0.1"),
]


@pytest.mark.parametrize(("one", "other", "message"), PAIRS)
def test_modules_of_torch_that_compute_otherwise_are_refused(tmp_path, one, other, message):
    takes_pictures = not isinstance(one(), nn.Embedding)
    if takes_pictures:
        runs = [[outputs(make(), train) for train in (False, True)] for make in (one, other)]
        same = [
            all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*pair, strict=True))
            for pair in zip(*runs, strict=True)
        ]
        assert not all(same)

    def around(make):
        model = Around(make() if takes_pictures else nn.Identity())
        model.other = nn.Identity() if takes_pictures else make()
        return model

    file = saved(tmp_path / "small.safetensors", around(one))
    refused(file, f"module '(inner|other)' has {message}", around(other))
    sgfx.load(file, into=around(one))


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, **options)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x)[0]


class Recurs(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent = kind(16, 16, **options)

    def forward(self, x):
        return self.recurrent(x.flatten(2))[0]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            lambda: Attends(num_heads=2),
            lambda: Attends(num_heads=4),
            "inner.attention' has head_dim 4 in the file and 2",
        ),
        (lambda: Attends(num_heads=2, batch_first=True), lambda: Attends(num_heads=2), "has batch_first True in the"),
        (lambda: Recurs(nn.GRU), lambda: Recurs(nn.GRU, batch_first=True), "has batch_first False in the file and"),
        (
            lambda: Recurs(nn.RNN),
            lambda: Recurs(nn.RNN, nonlinearity="relu"),
            "has mode RNN_TANH in the file and RNN_R",
        ),
    ],
)
def test_modules_of_several_tensors_are_compared_too(tmp_path, one, other, message):
    file = saved(tmp_path / "small.safetensors", Around(one()))
    refused(file, message, Around(other()))
    sgfx.load(file, into=Around(one()))


class Way(enum.Enum):
    UP = 1
    DOWN = 2


def doubled(x, own):
    return own.factor * x


class Own(nn.Module):
    """A user's module: its forward reads some of its attributes, directly or not."""

    shift = 0.0

    def __init__(self, **given):
        super().__init__()
        self.scale, self._power, self.act, self.way, self.factor = 0.5, 1, F.relu, Way.UP, 2.0
        self.options, self.settings = {"dim": 1}, SimpleNamespace(beta=1.0, lr=0.1)
        self.mean, self.pool, self.table = torch.zeros(3), functools.partial(F.avg_pool2d, kernel_size=1), [1, 2]
        self.root = 8**-0.5
        most = given.pop("most", 100.0)
        self.bound = lambda x: x.clamp(max=most)
        # What a training keeps for itself.
        self.epoch, self.path, self.pretrained, self.device = 0, "runs/1", False, "cpu"
        self.calls, self.seen, self.cache, self.counts = 0, [], {}, {"calls": 0}
        for name, value in given.items():
            holder = self.settings if hasattr(self.settings, name) else self
            setattr(holder, name, value)

    @property
    def half(self):
        return self.table[0]

    def helper(self, x):
        return x.softmax(**self.options) * self.settings.beta + self.half

    def save(self):
        return self.path, self.epoch, self.settings.lr

    def forward(self, x):
        self.calls += 1
        self.seen.append(float(x.detach().mean()))
        self.cache[x.shape] = self.calls
        self.counts["calls"] += 1
        x = self.act(x.to(self.device) * self.scale) ** getattr(self, "_power")  # noqa: B009
        x = doubled(self.helper(x), self) + float(self.mean.sum()) + self.shift
        return self.bound(self.pool(x if self.way is Way.UP else -x) * self.root)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 0.25}, "scale 0.25 in the file and 0.5 in the model"),
        ({"_power": 2}, "_power 2 in the file and 1"),
        ({"act": F.gelu}, "act gelu in the file and relu"),
        ({"way": Way.DOWN}, "way Way.DOWN in the file and Way.UP"),
        ({"factor": 3.0}, "factor 3.0 in the file and 2.0"),
        ({"options": {"dim": 2}}, r"options {'dim': 2} in the file and {'dim': 1}"),
        ({"beta": 2.0}, "settings.beta 2.0 in the file and 1.0"),
        ({"mean": torch.ones(3)}, r"mean \[\[3\], 1.5, 0.0\] in the file and"),
        ({"pool": functools.partial(F.avg_pool2d, kernel_size=2)}, "pool .*'kernel_size': 2.* in the file"),
        ({"table": [0, 2]}, r"table \[0, 2\] in the file and \[1, 2\]"),
        ({"most": 0.1}, r"bound .*'most': 0.1.* in the file and"),
        ({"shift": 1.0}, "shift 1.0 in the file and 0.0"),
    ],
)
def test_attributes_of_ones_own_that_the_forward_reads_are_compared(tmp_path, given, message):
    file = saved(tmp_path / "small.safetensors", Around(Own(**given)))
    refused(file, f"module 'inner' has {message}", Around(Own()))
    loaded = sgfx.load(file, into=Around(Own(**given)))
    assert loaded.inner.calls == 0


def test_what_a_training_keeps_for_itself_does_not_make_a_file_unreadable(tmp_path):
    model = Around(Own(epoch=7, path="runs/2", pretrained=True, device="cuda", lr=0.01))
    torch.manual_seed(0)
    model.inner.device = "cpu"
    small = sgfx.compile(model, groups=2, ratio=0.5, example_inputs=X)
    expected = small(X)
    assert torch.equal(small(X), expected)
    small.inner.device = "cuda"
    assert (small.inner.calls, len(small.inner.seen), small.inner.counts) == (2, 2, {"calls": 2})
    small.note, small.inner.rate, small.stem.lr_mult = "mine", 3.0, 0.1
    small.inner.root *= 1 + 1e-9  # another machine's last digit
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=Around(Own()))
    assert torch.equal(loaded(X), expected)
    assert (loaded.inner.epoch, loaded.inner.path) == (0, "runs/1")


def test_detectors_are_told_apart_by_their_boxes(tmp_path):
    def detector(**options):
        return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **options)

    def boxes(size):
        return detection.anchor_utils.AnchorGenerator(((size,) * 3,) * 5, ((0.5, 1.0, 2.0),) * 5)

    file = tmp_path / "small.safetensors"
    one = detector(score_thresh=0.5)
    one.backbone = sgfx.compile(one.backbone, groups=2, ratio=0.5, ignore=["body.*"])
    sgfx.save(one, file)
    with pytest.raises(sgfx.InputError, match=r"the model has score_thresh 0.5 in the file and 0.05 in the model"):
        sgfx.load(file, into=detector())
    with pytest.raises(sgfx.InputError, match=r"module 'anchor_generator' has sizes .* in the file and"):
        sgfx.load(file, into=detector(score_thresh=0.5, anchor_generator=boxes(32)))
    sgfx.load(file, into=detector(score_thresh=0.5))


def test_a_grouped_layer_is_described_as_the_dense_one_it_was_made_from():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2, 1, 1, padding_mode="reflect"), nn.Flatten(), nn.Linear(32, 8)
    )
    model[1].note = 3
    small = sgfx.compile(model, groups=2, ratio=0.5)
    dense, grouped = describe(model), describe(small)
    assert sgfx.plans(small)["1"].grouped
    assert sgfx.plans(small)["3"].grouped
    assert {**grouped, "plans": {}, "cuts": {}} == dense
    assert dense["modules"]["1"]["stride"] == [2, 2]
    assert json.loads(json.dumps(grouped)) == grouped
    small = eliminated_net()
    assert cuts(small)
    assert describe(small)["modules"] == describe(Net())["modules"]


def test_files_of_format_1_are_compared_by_what_they_have(file):
    few = ("class", "kernel_size", "stride", "padding", "dilation", "padding_mode", "output_size", "ceil_mode", "eps")

    def shorten(structure, _):
        structure["format"] = 1
        for record in structure["modules"].values():
            for key in record.keys() - few:
                del record[key]

    rewrite(file, shorten)
    model = Net()
    model.block[1].inplace = True  # which format 1 does not know
    sgfx.load(file, into=model)
    refused(file, r"module 'block.0' has stride \[1, 1\] in the file and \[2, 2\] in the model", Net(stride=2))
