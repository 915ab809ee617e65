"""Channel analysis and elimination: what is read, what must stay and why, and that what is left computes the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.elimination.analysis import analyse
from passes.elimination.elimination import CUTS, ELIMINATION, UNCUT
from passes.elimination.labels import along
from passes.elimination.rules import moving
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.layers.channel_cut import cuts
from passes.options.settings import SETTINGS, Settings
from passes.tracing.regions import find_regions

IMAGES = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def analysed(model, *inputs):
    return analyse(model, find_regions(model), inputs or (torch.zeros(2, 3, 8, 8),))


def kill(layer, *inputs):
    """Make a dense layer depend on nothing of some inputs, for the masked twin to be pruned there by l1."""
    layer.weight.data[:, list(inputs)] = 0


class Chain(nn.Module):
    """Three convolutions with norms; `between` stands between the first two."""

    def __init__(self, between=lambda self, x: x, width=8, read=8):
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(read, 8, 1)
        self.c = nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x):
        x = self.between(self, torch.relu(self.norm(self.a(x))))
        return self.c(torch.relu(self.b(x)))


def compiled(model, killed=(0, 3), **options):
    """Prune `b` so that it reads neither of the killed inputs, and eliminate."""
    kill(model.b, *killed)
    share = len(killed) / model.b.weight.shape[1]
    options = {"ratio": 0.0, "groups": 1, "overrides": {"b": {"ratio": share, "groups": 1}}} | options
    dense = sgfx.compile(model.double(), **options)
    return dense, sgfx.compile(model, eliminate=True, **options)


def check_equal(dense, small, inputs=IMAGES):
    for training in (False, True):
        dense.train(training)
        small.train(training)
        outputs = [each(inputs) for each in (dense, small)]
        assert torch.allclose(*outputs, rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for (name, a), (_, b) in zip(dense.named_parameters(), small.named_parameters(), strict=True):
        cut = cuts(small).get(name.rpartition(".")[0])
        if cut is None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-10), name


def test_filters_that_nobody_reads_go_with_their_norms_entries():
    model = Chain()
    model.norm.running_var.copy_(torch.arange(1, 9))
    dense, small = compiled(model)
    assert small.norm.running_var.tolist() == [2, 3, 5, 6, 7, 8]
    assert small.a.weight.shape == (6, 3, 3, 3)
    assert small.norm.num_features == len(small.norm.running_mean) == len(small.norm.weight) == 6
    assert small.b.in_channels == 6
    assert cuts(small)["a"].outputs.tolist() == cuts(small)["norm"].outputs.tolist() == [1, 2, 4, 5, 6, 7]
    assert cuts(small)["b"].inputs.tolist() == [1, 2, 4, 5, 6, 7]
    check_equal(dense, small)
    kept = cuts(small)["a"].outputs
    assert torch.allclose(dense.a.weight.grad[kept], small.a.weight.grad, rtol=1e-8)
    assert torch.count_nonzero(dense.a.weight.grad[[0, 3]]) == 0
    # Convolutions of other sizes may add in another order.
    assert torch.allclose(dense.norm.running_var[kept], small.norm.running_var, rtol=1e-14)


def test_it_goes_up_the_network_until_nothing_changes():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 1, bias=False) for _ in range(4))).double()
    last = model[3].weight.data
    last[:, :4] = 0
    for index in (1, 2):  # filter f reads input f alone
        model[index].weight.data = torch.eye(8, dtype=torch.float64)[:, :, None, None]
    overrides = {"1": {"ratio": 7 / 8}, "2": {"ratio": 7 / 8}, "3": {"groups": 1, "ratio": 0.5}}
    options = {"groups": 8, "ratio": 0.0, "overrides": overrides}
    small = sgfx.compile(model, eliminate=True, **options)
    assert [len(layer.weight) for layer in small] == [4, 4, 4, 32]
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert torch.allclose(small(x), model(x), rtol=1e-12)


class Reader(nn.Module):
    """Two branches whose channels meet."""

    def __init__(self, meet):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.meet = meet

    def forward(self, x):
        x = self.stem(x)
        return self.meet(self.left(x), self.right(x))


def present(channels, path):
    site = channels.sites[path]
    return channels.present[site.slots].tolist()


def test_what_meets_in_a_sum_stays_or_goes_together():
    class Model(Reader):
        def __init__(self):
            super().__init__(None)
            self.out = nn.Conv2d(8, 4, 1, bias=False)
            self.tap = nn.Conv2d(8, 4, 1, bias=False)

        def forward(self, x):
            x = self.stem(x)
            left, right = self.left(x), self.right(x)
            return self.out(left + right), self.tap(left)

    torch.manual_seed(0)
    model = Model().double()
    kill(model.out, 0, 1, 2, 3)
    kill(model.tap, 0, 1, 4, 5)
    options = {"ratio": 0.0, "groups": 1, "overrides": {"out": {"ratio": 0.5}, "tap": {"ratio": 0.5}}}
    small = sgfx.compile(model, eliminate=True, **options)
    found = cuts(small)
    assert found["left"].outputs.tolist() == found["right"].outputs.tolist() == [2, 3, 4, 5, 6, 7]
    assert all(torch.allclose(a, b) for a, b in zip(small(IMAGES), model(IMAGES), strict=True))


@pytest.mark.parametrize(
    ("between", "gone"),
    [
        (lambda self, x: F.dropout(F.max_pool2d(x, 2), 0.5, training=False), True),
        (lambda self, x: F.interpolate(x * 2.0 + 1, scale_factor=2), True),
        (lambda self, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), True),
        (lambda self, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), True),
        (lambda self, x: x[:, :, ::2, 1:], True),
        (lambda self, x: x.view(x.size(0), -1, x.size(2), x.size(3)), True),
        (lambda self, x: x.flip(1).flip(1), True),
        (lambda self, x: torch.cat([x, x], 3), True),
        (lambda self, x: F.pad(x, (1, 1, 0, 2)), True),
        (lambda self, x: F.softmax(x, 3), True),
        (lambda self, x: (x * 2).add_(x), True),
        (lambda self, x: F.softmax(x, 1), False),
        (lambda self, x: x.view(x.size(0), 8, 8, 8), False),
        (lambda self, x: x.view(x.size(0), x.size(1), 8, 8), False),
        (lambda self, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], False),
        (lambda self, x: torch.cat([x[:, :4], x[:, 4:]], 1), False),
        (lambda self, x: torch.cat(x.chunk(2, 1), 1), False),
        (lambda self, x: x.view(x.size(0), 2, 4, 8, 8).transpose(1, 2).flatten(1, 2), False),
        (lambda self, x: x.roll(1, 1), False),
        (lambda self, x: x + torch.ones(8, 1, 1), False),
        (lambda self, x: x * x.mean(1, keepdim=True), False),
        (lambda self, x: x * x[:, :1], False),
        (lambda self, x: F.group_norm(x, 4), False),
        (lambda self, x: F.local_response_norm(x, 3), False),
        (lambda self, x: x.squeeze(), False),
        (lambda self, x: x / x.shape[1], False),
    ],
)
def test_operations_between_layers(between, gone):
    torch.manual_seed(0)
    dense, small = compiled(Chain(between))
    assert ("a" in cuts(small)) == gone
    check_equal(dense, small)


def test_option_a_shortcuts_pad_and_slice():
    def shortcut(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))

    torch.manual_seed(0)
    dense, small = compiled(Chain(shortcut, width=4), killed=(0, 2, 7))
    assert cuts(small)["a"].outputs.tolist() == [1, 2, 3]  # input 2 is filter 0; the zeros that are padded on stay
    assert small.b.in_channels == 7
    check_equal(dense, small)


def test_flatten_into_linear_removes_all_features_of_a_channel():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Linear(45, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = F.adaptive_avg_pool2d(self.norm(self.a(x)), 3)
            return self.c(self.b(x.view(x.size(0), -1)))

    torch.manual_seed(0)
    dense, small = compiled(Model(), killed=[*range(9, 18), 44])
    assert cuts(small)["a"].outputs.tolist() == [0, 2, 3, 4]
    assert small.b.in_features == 36
    check_equal(dense, small)


def test_whoever_reads_in_one_mode_reads():
    class Model(Chain):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = torch.relu(self.norm(self.a(x)))
            y = self.c(torch.relu(self.b(x)))
            return y + self.auxiliary(x) if self.training else y

    torch.manual_seed(0)
    dense, small = compiled(Model())
    assert cuts(small) == {}
    dense, small = compiled(Model(), ignore="auxiliary")
    assert cuts(small) == {}
    channels = analyse(dense, find_regions(dense), (IMAGES,))
    assert set(channels.readers.successors("a")) == {"norm", "b", "auxiliary"}


def test_labels_of_joined_and_padded_tensors_take_one_number_for_each_channel():
    class Notes:
        def tie(self, *_):
            raise AssertionError("nothing meets")

    parts = [along(torch.arange(start, start + 3), (2, 3, 50, 50), 1) for start in (1, 4)]
    joined = moving(Notes(), "cat", torch.cat, (parts,), {"dim": 1}, "")
    padded = moving(Notes(), "pad", F.pad, (joined, (1, 0, 2, 2, 1, 2)), {}, "")
    assert joined.shape == (2, 6, 50, 50)
    assert padded.shape == (2, 9, 54, 51)
    assert padded[1, :, 3, 7].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    assert (joined.untyped_storage().nbytes(), padded.untyped_storage().nbytes()) == (6 * 8, 9 * 8)


def test_hooks_see_every_channel_and_may_change_shapes():
    torch.manual_seed(0)
    model = Chain()
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    _, small = compiled(model)
    assert cuts(small) == {}
    small(IMAGES)
    assert seen[-1][1] == 8


def test_reasons_name_what_needs_the_channels():
    channels = analysed(Chain(lambda self, x: F.group_norm(x.view(x.size(0), 8, 8, 8), 4)))
    assert channels.reasons["a"] == "counted by 'view'"
    channels = analysed(Chain(lambda self, x: F.group_norm(x, 4)))
    assert channels.reasons["a"] == "read by group_norm"
    assert channels.reasons["c"] == "given out by the model"


def test_depthwise_convolutions_and_frozen_norms_follow_their_inputs():
    from torchvision.ops import FrozenBatchNorm2d

    class Model(Chain):
        def __init__(self):
            super().__init__()
            self.depthwise, self.frozen = nn.Conv2d(8, 8, 3, groups=8), FrozenBatchNorm2d(8)
            self.frozen.running_mean.uniform_()

        def forward(self, x):
            return self.c(self.b(self.frozen(self.depthwise(torch.relu(self.norm(self.a(x)))))))

    torch.manual_seed(0)
    dense, small = compiled(Model())
    assert small.depthwise.groups == small.depthwise.in_channels == len(small.depthwise.weight) == 6
    assert len(small.frozen.running_mean) == len(small.a.weight) == 6
    check_equal(dense, small)


def test_shared_modules_are_not_cut():
    class Model(Chain):
        def __init__(self):
            super().__init__()
            self.again = self.a

    torch.manual_seed(0)
    _, small = compiled(Model())
    assert cuts(small) == {}


def test_a_module_called_twice_ties_what_it_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.twin, self.b, self.c = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (3, 8), (8, 8), (8, 4)))

        def forward(self, x):
            return self.c(self.b(F.avg_pool2d(self.a(x), 2))) + self.c(self.b(self.twin(x[:, :, :4, :4])))

    torch.manual_seed(0)
    dense, small = compiled(Model(), example_inputs=IMAGES)
    assert cuts(small)["a"].outputs.tolist() == cuts(small)["twin"].outputs.tolist() == [1, 2, 4, 5, 6, 7]
    check_equal(dense, small)


def test_no_layer_loses_its_last_filter():
    class Model(Chain):
        def forward(self, x):
            return self.c(torch.zeros_like(self.b(self.a(x))))

    torch.manual_seed(0)
    model = Model().double()
    small = sgfx.compile(model, groups=2, ratio=0.5, eliminate=True)
    assert torch.allclose(small(IMAGES), model(IMAGES))


def width_of(layer):
    return layer.out_channels


@pytest.mark.parametrize(
    "count",
    [
        lambda model: model.a.out_channels,
        lambda model: model.b.in_channels,
        lambda model: model.norm.num_features,
        lambda model: width_of(model.a),
        lambda model: torch.arange(model.a.out_channels).sum(),
    ],
)
def test_a_forward_that_computes_with_a_layers_number_of_channels_keeps_them(count):
    class Model(Chain):
        def forward(self, x):
            return super().forward(x) * count(self)

    torch.manual_seed(0)
    dense, small = compiled(Model())
    assert cuts(small) == {}
    check_equal(dense, small)
    compilation = Compilation(small, {SETTINGS: Settings(example_inputs=(IMAGES,))})
    run_passes(ELIMINATION, compilation)
    assert cuts(small) == compilation[CUTS] == {}
    assert set(compilation[UNCUT].values()) == {"the model's own code computes with a layer's number of channels"}


def test_code_that_is_not_traced_and_asks_for_the_number_of_channels_keeps_them():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Chain()

        def forward(self, images):
            return torch.cat([self.net(image[None]) * self.net.a.out_channels for image in images])

    torch.manual_seed(0)
    model = Wrapper().double()
    kill(model.net.b, 0, 3)
    options = {"ratio": 0.0, "groups": 1, "overrides": {"net.b": {"ratio": 0.25, "groups": 1}}, "eliminate": True}
    small = sgfx.compile(model, example_inputs=IMAGES, **options)
    assert cuts(small) == {}
    assert torch.allclose(small.eval()(IMAGES), model.eval()(IMAGES))


def test_elimination_in_place_keeps_the_model_and_what_was_not_cut():
    torch.manual_seed(0)
    model = Chain().double()
    kill(model.b, 0, 3)
    dense = copy.deepcopy(model)
    c, between = model.c.bias, model.between
    options = {"groups": 1, "overrides": {"b": {"ratio": 0.25, "groups": 1}}}
    small = sgfx.compile(model, ratio=0.0, inplace=True, eliminate=True, **options)
    assert small is model
    assert model.c.bias is c
    assert model.between is between
    assert torch.allclose(model.eval()(IMAGES), dense.eval()(IMAGES))
    again = sgfx.compile(dense, ratio=0.0, step=0.25, eliminate=True, **options)
    assert again.a.out_channels == 6


def test_a_part_of_a_model_is_cut_only_where_a_run_has_shown_how_it_is_used():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Chain()

        def forward(self, images):
            return torch.cat([self.net(image[None]) for image in images])

    torch.manual_seed(0)
    model = Wrapper().double()
    kill(model.net.b, 0, 3)
    options = {"ratio": 0.0, "groups": 1, "overrides": {"net.b": {"ratio": 0.25, "groups": 1}}, "eliminate": True}
    assert cuts(sgfx.compile(model, **options)) == {}
    small = sgfx.compile(model, example_inputs=IMAGES, **options)
    assert small.net.a.out_channels == 6
    assert torch.allclose(small.eval()(IMAGES), model.eval()(IMAGES))
