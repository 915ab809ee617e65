"""Which layers are regrouped, and one test for each reason to leave a layer alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from passes.compression.selection import select
from passes.errors import InputError
from passes.options.checks import checked_settings
from passes.tracing.regions import find_regions


def selected(model, **options):
    """Targets and reasons for `model`."""
    settings = checked_settings(model, **{"ratio": 0.5} | options)
    return select(model, find_regions(model), settings)


def reasons(model, **options):
    return selected(model, **options)[1]


class Wrapped(nn.Module):
    """A layer under test between two ordinary ones, so that it is neither first nor alone."""

    def __init__(self, layer, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layer = layer
        self.next = nn.Conv2d(channels, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.next(self.layer(self.stem(x))))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def replaced_forward():
    layer = nn.Conv2d(8, 8, 1)
    layer.forward = lambda x: x
    return layer


def pruned():
    with torch.no_grad():  # with a gradient history it could not even be copied
        return prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.5)


def with_buffer():
    layer = nn.Conv2d(8, 8, 1)
    layer.register_buffer("scale", torch.ones(1))
    return layer


def with_mixed_types():
    layer = nn.Conv2d(8, 8, 1)
    layer.bias.data = layer.bias.data.double()
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise convolution"),
        (nn.Conv2d(8, 8, 3, groups=2), r"already grouped \(groups=2\)"),
        (nn.ConvTranspose2d(8, 8, 3), "transposed convolution"),
        (Standardized(8, 8, 3), r"a subclass of torch's layers \(Standardized\)"),
        (replaced_forward(), "its forward was replaced on the instance"),
        (parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "its weight is parametrized"),
        (parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), "its weight is parametrized"),
        (pruned(), "its weight is computed"),
        (with_buffer(), "it holds more than weight and bias"),
        (with_mixed_types(), "its bias has another dtype"),
        (nn.Conv2d(8, 8, 1, dtype=torch.complex64), "its weight is complex64"),
    ],
)
def test_layers_that_can_not_be_regrouped(layer, reason):
    model = Wrapped(layer)
    assert selected(model)[0].keys() == {"next", "last"}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons(model)["layer"])
    with pytest.raises(InputError, match=f"overrides names layer 'layer', which can't be regrouped: .*{reason}"):
        selected(model, overrides={"layer": {"ratio": 0.1}})


@pytest.mark.parametrize(
    ("layer", "channels", "reason"),
    [
        (nn.Conv2d(8, 3, 1), 3, "fewer than 4 filters (3)"),
        (nn.Sequential(nn.AvgPool3d((3, 1, 1)), nn.Conv2d(2, 8, 1)), 8, "fewer than 4 inputs (2)"),
    ],
)
def test_small_layers_are_left_alone_unless_named(layer, channels, reason):
    model = Wrapped(layer, channels)
    path = "layer" if isinstance(layer, nn.Conv2d) else "layer.1"
    assert reasons(model)[path] == reason
    assert reasons(model, overrides={f"{path}*": {"ratio": 0.1}})[path] == reason
    assert selected(model, overrides={path: {"ratio": 0.1}})[0][path].ratio == 0.1


class OutOfOrder(nn.Module):
    """The first convolution to run is not the first to be registered."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(8, 8, 1)
        self.stem = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.body(self.stem(x))


def test_the_first_convolution_is_the_first_to_run():
    targets, left = selected(OutOfOrder())
    assert left == {"stem": "first convolution"}
    assert targets.keys() == {"body"}
    assert "stem" in selected(OutOfOrder(), overrides={"stem": {}})[0]
    assert "stem" in selected(OutOfOrder(), overrides={"s*m": {"ratio": 0.1}})[1]


def test_linear_layers_before_a_convolution_do_not_count_as_first():
    model = nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1))
    assert reasons(model) == {"2": "first convolution"}


def test_a_shared_weight_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert reasons(model) == {"0": "its weight is shared with '2.weight'", "2": "its weight is shared with '0.weight'"}


def test_weights_that_overlap_in_memory_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    storage = torch.randn(12, 8)
    model[0].weight.data, model[1].weight.data = storage[:8], storage[4:]
    assert reasons(model).keys() == {"0", "1"}
    # Side by side in one storage is no overlap: optimizers that flatten parameters do that.
    storage = torch.randn(16, 8)
    model[0].weight.data, model[1].weight.data = storage[:8], storage[8:]
    assert reasons(model) == {}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.two = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        return self.other(self.two(self.one(x)))


def test_a_module_registered_twice_is_left_alone():
    assert "is shared with" in reasons(Twice())["one"]


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.head(x))


def test_a_module_called_twice_is_regrouped():
    assert selected(Repeated())[0].keys() == {"head"}


class Borrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        y = self.other(self.encoder(x))
        return F.linear(y, self.encoder.weight.t()) if self.training else y


def test_a_weight_read_elsewhere_in_either_mode_is_left_alone():
    assert reasons(Borrowing()) == {"encoder": "its weight is read by an operation outside its own call"}


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.encoder(self.attention(x, x, x)[0]))


def test_layers_inside_modules_that_read_them_themselves_are_left_alone():
    targets, left = selected(Attending())
    assert targets.keys() == {"last"}
    assert left["attention.out_proj"] == "inside 'attention', and MultiheadAttention reads its parameters itself"
    assert left["encoder.linear1"] == "inside 'encoder', and TransformerEncoderLayer reads its parameters itself"


class Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.order = [self.first]

    def forward(self, x):
        return self.second(self.order[0](x))


def test_a_layer_that_a_plain_list_holds_too_is_left_alone():
    assert reasons(Listing()) == {"first": "also held outside the registered submodules, by 'order'"}


def test_a_weight_that_a_plain_list_holds_too_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.penalized = {"l1": [model[1].weight]}
    assert reasons(model) == {"1": "its weight is also held outside the registered parameters, by 'penalized'"}


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.auxiliary(self.used(x)) if self.training else self.used(x)


def test_a_layer_that_nothing_calls_is_left_alone_and_one_of_training_alone_is_not():
    targets, left = selected(Idle())
    assert left == {"unused": "nothing calls it, in eval or in train mode"}
    assert targets.keys() == {"used", "auxiliary"}


def nested():
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("ignore", "left"),
    [("1", {"1.0", "1.1"}), (["1.*"], {"1.0", "1.1"}), (["*.1"], {"1.1"}), ("0", {"0"}), ("[02]", {"0", "2"})],
)
def test_ignore_takes_names_with_all_below_them_and_patterns_over_whole_paths(ignore, left):
    assert reasons(nested(), ignore=ignore) == dict.fromkeys(left, "ignored")


def test_ignore_takes_modules():
    model = nested()
    assert reasons(model, ignore=[model[1], model[0]]).keys() == {"0", "1.0", "1.1"}


def test_exact_overrides_win_over_patterns_and_later_patterns_over_earlier():
    overrides = {"1.1": {"ratio": 0.9}, "1.*": {"ratio": 0.2, "groups": 3}, "*.0": {"ratio": 0.3}}
    targets, _ = selected(nested(), overrides=overrides, groups=2)
    asked = {path: (target.groups, target.ratio) for path, target in targets.items()}
    assert asked == {"0": (2, 0.5), "1.0": (3, 0.3), "1.1": (3, 0.9), "2": (2, 0.5)}


def test_linear_layers_have_a_ratio_of_their_own_and_groups_are_clipped_to_the_filters():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 6))
    targets, _ = selected(model, linear_ratio=0.25, groups=5)
    assert (targets["1"].groups, targets["1"].ratio) == (4, 0.5)
    assert (targets["3"].groups, targets["3"].ratio) == (5, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["head"]}, "ignore entry 'head' matches no module"),
        ({"ignore": ["1.7"]}, r"ignore entry '1.7' matches no module of the model; did you mean '1"),
        ({"ignore": [nn.Linear(1, 1)]}, "ignore holds a Linear that is not a module of the model"),
        ({"overrides": {"1.7": {}}}, "override name '1.7' matches no convolution or linear layer"),
        ({"overrides": {"x*": {}}}, r"override pattern 'x\*' matches no convolution or linear layer"),
        ({"overrides": {"1": {}}}, r"for all layers below it write '1\.\*'"),
        ({"overrides": {"0": {"rato": 0.5}}}, r"override of '0' sets \['rato'\]"),
        ({"overrides": {"0": {"ratio": 1}}}, "ratio of override '0' must be at least 0 and below 1, not 1"),
        ({"overrides": {"0": {"groups": 0}}}, "groups of override '0' must be at least 1"),
        ({"overrides": {"1.0": {}}, "ignore": "1"}, r"'1.0' is both overridden and ignored \(by '1'\)"),
        ({"ignore": "*"}, "nothing to compress: '0': ignored; '1.0': ignored; '1.1': ignored; '2': ignored"),
        ({"criterion": "l3"}, "criterion must be 'l1', 'l2' or a callable"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        selected(nested(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2.0}, "groups must be an integer, not 2.0"),
        ({"ratio": "half"}, "ratio must be a number"),
        ({"ignore": [3]}, "ignore takes names, patterns and modules, not 3"),
        ({"overrides": ["0"]}, "overrides must be a dict"),
        ({"overrides": {"0": 0.5}}, "overrides takes"),
        ({"example_inputs": [torch.zeros(1)]}, "example_inputs must be a tensor, a tuple of positional"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        selected(nested(), **options)


def test_a_bare_layer_and_a_model_without_layers_have_nothing_to_compress():
    with pytest.raises(InputError, match=r"the model is a layer itself: wrap it in nn.Sequential"):
        selected(nn.Linear(8, 8))
    with pytest.raises(InputError, match="it has no convolutions or linear layers"):
        selected(nn.Sequential(nn.ReLU()))
