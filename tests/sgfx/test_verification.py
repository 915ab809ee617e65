"""`sgfx.verify`: exact where the compiler is, loud where something is wrong, and without a trace on the models."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.ops import StochasticDepth

import models_zoo
import sgfx
from passes.layers.channel_cut import Cut, cuts
from passes.layers.grouped import Grouped, GroupedLinear
from passes.layers.plan import LayerPlan
from passes.models.reference import as_rows, kept_rows

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with a norm, dropout, stochastic depth and an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
        self.depth = StochasticDepth(0.5, "row")
        self.fc, self.aux = nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = F.dropout((y + self.depth(self.block(y))).mean((2, 3)), 0.3, self.training)
        return (self.fc(y), self.aux(y)) if self.training else self.fc(y)


def pair(dtype=torch.float64, model=None, **options):
    torch.manual_seed(0)
    dense = (Net() if model is None else model).to(dtype)
    return dense, sgfx.compile(dense, **{"groups": 3, "ratio": 0.6, **options})


@pytest.mark.parametrize("form", ["dense", "blocks"])
@pytest.mark.parametrize("name", ["resnet20", "densenet_bc"])
def test_compiled_networks_equal_their_masked_ones(name, form):
    options = {"depth": 16, "growth": 6} if name == "densenet_bc" else {}
    torch.manual_seed(0)
    dense, small = pair(model=models_zoo.create(name, **options))
    for layer in small.modules():
        if isinstance(layer, Grouped):
            layer.form = form
    found = sgfx.verify(dense, small, IMAGES)
    assert found.max_error < 1e-12
    assert found.gradient_error < 1e-10
    assert found.moved == 0
    assert [layer.path for layer in found.layers] == list(sgfx.plans(small))


def test_random_layers_draw_the_same_numbers():
    dense, small = pair()
    found = sgfx.verify(dense, small, IMAGES)
    assert (found.max_error, found.gradient_error) == (0, 0)
    assert str(found).endswith("all 5 layers agree exactly")


def test_layers_that_one_mode_does_not_call_have_no_error_there():
    found = sgfx.verify(*pair(), IMAGES)
    errors = {layer.path: (layer.eval_error, layer.train_error) for layer in found.layers}
    assert errors["aux"] == (None, 0)
    assert errors["fc"] == (0, 0)


def test_it_serves_after_fine_tuning_and_says_how_far_the_weights_have_moved():
    dense, small = pair()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(small(IMAGES)[0], torch.arange(4)).backward()
        optimizer.step()
    found = sgfx.verify(dense, small, IMAGES)
    assert found.max_error < 1e-12
    assert 0.001 < found.moved < 1
    layers = {layer.path: layer for layer in found.layers}
    assert layers["aux"].moved == 0
    assert layers["fc"].moved > 0.001


def test_the_distance_moved_by_hand():
    dense, small = pair(model=nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)))
    plan = sgfx.plans(small)["1"]
    kept = dense[1].weight.detach()[:, :, 0, 0][plan.keep[plan.labels]]
    with torch.no_grad():
        small[1].weight.mul_(1.5)
    found = sgfx.verify(dense, small, IMAGES)
    total = float((dense[0].weight.detach().square().sum() + kept.square().sum()).sqrt())
    assert found.moved == pytest.approx(0.5 * float(kept.norm()) / total, rel=1e-12)
    assert [layer.moved for layer in found.layers] == pytest.approx([0, 0.5], rel=1e-12)


# What goes wrong is found, and where.


def swap_rows(small):
    layer = small.block[2]
    layer._rows = layer._rows.flip(0)


def scale_in_training(small):
    def forward(self, x):
        return GroupedLinear.forward(self, x) * (1 + 1e-3 * self.training)

    small.aux.forward = forward.__get__(small.aux)


def forget_the_bias(small):
    small.block[2].forward = lambda x: Grouped.forward(small.block[2], x) - small.block[2].bias[:, None, None]


@pytest.mark.parametrize(
    ("spoil", "first", "eval_differs"),
    [(swap_rows, "block.2", True), (scale_in_training, "aux", False), (forget_the_bias, "block.2", True)],
)
def test_a_wrong_layer_is_found(spoil, first, eval_differs):
    dense, small = pair()
    spoil(small)
    found = sgfx.verify(dense, small, IMAGES)
    assert found.max_error > 1e-4
    different = [layer.path for layer in found.layers if layer.eval_error or layer.train_error]
    assert different[0] == first
    assert (found.eval_error > 1e-6) == eval_differs
    assert found.train_error > 1e-6
    assert " of 5 layers differ:\nlayer    kind    eval" in str(found)
    assert first in str(found)


def test_other_shapes_and_nans_are_infinitely_far():
    dense, small = pair()
    small.fc.forward = lambda x: Grouped.forward(small.fc, x)[:, :9]
    assert sgfx.verify(dense, small, IMAGES).eval_error == float("inf")
    small.fc.forward = lambda x: Grouped.forward(small.fc, x) / 0
    assert sgfx.verify(dense, small, IMAGES).eval_error == float("inf")


def test_plain_data_and_text():
    dense, small = pair(torch.float32)
    for layer in small.modules():
        if isinstance(layer, Grouped):
            layer.form = "blocks"
    found = sgfx.verify(dense, small, IMAGES.float())
    data = json.loads(json.dumps(found.to_dict()))
    assert data["max_error"] == found.max_error < 1e-5
    assert len(data["layers"]) == 5
    assert data["layers"][1]["path"] == "block.0"
    assert str(found).startswith(f"largest error {found.max_error:.1e}: outputs {found.eval_error:.1e} in eval mode")


def test_the_live_models_are_neither_run_nor_changed():
    models = pair()
    fired = []
    for model in models:
        model.bn1.eval()
        model.block[0].register_forward_hook(lambda *_: fired.append(1))
    before = [copy.deepcopy(model.state_dict()) for model in models]
    modes = [[module.training for module in model.modules()] for model in models]
    images, state = IMAGES.clone(), torch.get_rng_state()
    sgfx.verify(*models, images)
    assert fired == []
    assert torch.equal(images, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    for model, tensors, mode in zip(models, before, modes, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        assert [module.training for module in model.modules()] == mode
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_detector_with_a_compiled_backbone():
    torch.manual_seed(0)
    dense = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).double()
    small = copy.deepcopy(dense)
    small.backbone = sgfx.compile(dense.backbone, groups=4, ratio=0.5)
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]).double(), "labels": torch.tensor([1])} for _ in images]
    found = sgfx.verify(dense, small, (images, targets))
    assert found.max_error < 1e-10
    assert found.gradient_error < 1e-8
    with pytest.raises(sgfx.InputError, match=r"but not in train mode: targets should not be none"):
        sgfx.verify(dense, small, (images,))


class Wide(nn.Module):
    """Of its middle layer, little is read: with its norms and a depthwise convolution, most of it can go."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.drop, self.conv2 = nn.Dropout2d(0.3), nn.Conv2d(16, 16, 1)
        self.bn3, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x):
        y = torch.relu(self.bn2(self.depthwise(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.relu(self.bn3(self.conv2(self.drop(y)))).mean((2, 3)))


@pytest.mark.parametrize("tuned", [False, True])
def test_models_with_fewer_channels_are_verified_too(tuned):
    dense, small = pair(model=Wide(), groups=2, ratio=0.8, eliminate=True, overrides={"conv1": {"ratio": 0.5}})
    assert {"conv1", "bn1", "depthwise", "bn2", "conv2"} <= set(cuts(small))
    if tuned:
        with torch.no_grad():
            for tensor in small.parameters():
                tensor.mul_(1.25)
            small.bn1.running_mean.add_(0.1)
    found = sgfx.verify(dense, small, IMAGES)
    assert found.max_error < 1e-12
    assert found.gradient_error < 1e-12
    assert found.moved == pytest.approx(0.25 if tuned else 0)
    small.bn2.weight.data = small.bn2.weight.data.flip(0) + 0.5  # it serves as a parameter, so this is no error
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-12
    small.conv2._rows = small.conv2._rows.flip(0)
    assert sgfx.verify(dense, small, IMAGES).max_error > 1e-4


def draw_structure(data):
    filters, inputs, groups = (data.draw(st.integers(1, 6), label) for label in ("filters", "inputs", "groups"))
    groups = min(groups, filters)
    rest = data.draw(st.lists(st.integers(0, groups - 1), min_size=filters - groups, max_size=filters - groups))
    row = st.lists(st.booleans(), min_size=inputs, max_size=inputs)
    keep = data.draw(st.lists(row, min_size=groups, max_size=groups))
    cut = [data.draw(st.none() | st.sets(st.integers(0, count - 1), min_size=1)) for count in (filters, inputs)]
    return [*range(groups), *rest], keep, cut


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_kept_rows_by_hand(data):
    labels, keep, (outputs, inputs) = draw_structure(data)
    shape = len(labels), len(keep[0])
    plan = LayerPlan("Conv2d", shape[1], shape[0], (1, 2), torch.tensor(labels), torch.tensor(keep), 0.0)
    cut = Cut(*(None if side is None else torch.tensor(sorted(side)) for side in (outputs, inputs)))
    weight = torch.rand(*shape, 1, 2)
    expected = [
        weight[filter_, channel]
        for group in range(len(keep))
        for filter_ in range(shape[0])
        for channel in range(shape[1])
        if labels[filter_] == group and keep[group][channel]
        if outputs is None or filter_ in outputs
        if inputs is None or channel in inputs
    ]
    actual = as_rows(weight)[kept_rows(weight.shape, plan, cut)]
    assert torch.equal(actual, torch.stack(expected) if expected else torch.zeros(0, 1, 2))
    bias = as_rows(weight[:, 0, 0, 0])[kept_rows(shape[:1], None, cut)]
    assert torch.equal(bias, weight[sorted(range(shape[0]) if outputs is None else outputs), 0, 0, 0])
    assert kept_rows((), None, Cut()).tolist() == [0]


# What is refused.


def without_a_buffer(dense, small):
    del small.bn1._buffers["running_mean"]


def with_a_layer_put_back(dense, small):
    plan = sgfx.plans(small)["fc"]
    small.fc = nn.Linear(8, 10).double()
    small.fc._sgfx_plan = plan


def of_another_width(dense, small):
    dense.fc = nn.Linear(8, 11).double()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_buffer, "small is no compiled form of dense: 'bn1.running_mean' of dense is not in small"),
        (with_a_layer_put_back, "small is no compiled form of dense: 'fc.weight' of dense is not in small, or differs"),
        (of_another_width, "small is no compiled form of dense: layer 'fc' of small is not in dense, or differs"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(spoil, message):
    dense, small = pair()
    spoil(dense, small)
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.verify(dense, small, IMAGES)


def test_models_and_inputs_that_cant_be_verified_are_refused():
    dense, small = pair()
    with pytest.raises(sgfx.InputError, match="small has no layer plans"):
        sgfx.verify(dense, dense, IMAGES)
    with pytest.raises(sgfx.InputError, match=r"example_inputs .* do not fit the model in eval mode"):
        sgfx.verify(dense, small, IMAGES[:, :2])
    with pytest.raises(sgfx.InputError, match=r"but not in train mode: Expected more than 1 value per"):
        sgfx.verify(dense, small, IMAGES[:1, :, :1, :1])
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple of positional"):
        sgfx.verify(dense, small, [IMAGES])
    pruner = sgfx.Pruner(dense, ratio=0.5, step=0.25)
    next(iter(pruner))
    with pytest.raises(sgfx.InputError, match=r"of small is masked, not regrouped: verify what Pruner.lower returns"):
        sgfx.verify(dense, pruner.model, IMAGES)
