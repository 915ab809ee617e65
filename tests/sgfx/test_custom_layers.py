"""Subclasses of torch's layers that only add to a convolution: compiled, saved, frozen, exported like any other."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sgfx
from passes.layers.custom import GroupedCustom, MaskedCustom
from passes.layers.grouped import Grouped
from tests.tools import custom_layers as layers
from tests.tools.custom_layers import Around, randomized

pytestmark = pytest.mark.filterwarnings("ignore:the data do not look like what the model was trained on")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def norm_and_relu():
    return {"norm": nn.BatchNorm2d(16), "activation": nn.ReLU()}


TRACED = {
    "static": lambda: layers.SameStatic(16, 16, 3, 2, size=14),
    "norm": lambda: layers.WithNorm(16, 16, 3, bias=False, **norm_and_relu()),
    "shapes": lambda: layers.ShapeReader(16, 16, 3),
    "call": lambda: layers.AroundTheCall(16, 16, 3),
    "named": lambda: layers.Named(16),
    "bias": lambda: layers.BiasApart(16, 16, 3),
    "counting": lambda: layers.Counting(16, 16, 3),
    "scaling": lambda: layers.Scaling(16, 16, 3),
    "flipping": lambda: layers.Flipping(16, 16, 3),
    "both signs": lambda: layers.BothSigns(16, 8, 3),
}
UNTRACEABLE = {
    "dynamic": lambda: layers.SameDynamic(16, 16, 3, 2),
    "checked": lambda: layers.Checked(16, 16, 3, **norm_and_relu()),
}
every_layer = pytest.mark.parametrize("make", (TRACED | UNTRACEABLE).values(), ids=TRACED | UNTRACEABLE)


class Others(nn.Module):
    """Layers of other dimensions, with their own code."""

    def __init__(self):
        super().__init__()
        self.signal = nn.Sequential(nn.Conv1d(3, 8, 1), layers.Signal(8, 8, 3))
        self.volume = nn.Sequential(nn.Conv3d(1, 8, 1), layers.Volume(8, 8, (1, 1, 3)))
        self.linear = layers.LowRank(16, 8)

    def forward(self, x):  # [N, 3, H, W]
        signal = self.signal(x.mean(2)).mean(2)
        volume = self.volume(x[:, None]).mean((2, 3, 4))
        return self.linear(torch.cat([signal, volume], 1))


def dense(make, seed=0):
    torch.manual_seed(seed)
    return randomized(Around(make()), seed)


def compiled(make, **options):
    model = dense(make)
    return model, sgfx.compile(model, **{"groups": 4, "ratio": 0.6} | options)


def masked_by_hand(model, small):
    """The dense model with zeros where connections are pruned: what the small one must compute."""
    twin = copy.deepcopy(model)
    for path, plan in sgfx.plans(small).items():
        if plan.grouped:
            weight = twin.get_submodule(path).weight
            weight.data *= plan.mask().view(*plan.mask().shape, *[1] * (weight.dim() - 2))
    return twin


def difference(one, other, inputs=IMAGES):
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).abs().max())


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_a_regrouped_subclass_computes_what_its_masked_weight_gives(make, training):
    model, small = compiled(make)
    assert isinstance(small.layer, GroupedCustom)
    assert not hasattr(small.layer, "parametrizations")
    reference = masked_by_hand(model, small)
    for twin in (reference, small):
        twin.train(training)
        twin.zero_grad()
        twin(IMAGES).square().sum().backward()
    for form in ("dense", "blocks"):
        small.layer.form = form
        assert difference(copy.deepcopy(reference), copy.deepcopy(small)) < 1e-14
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(small.get_buffer(name), buffer, rtol=1e-12, atol=1e-14)
    theirs = dict(reference.named_parameters())
    kept = sgfx.plans(small)["layer"].mask()
    assert torch.allclose(small.layer.weight.grad.norm(), theirs["layer.weight"].grad[kept].norm(), rtol=1e-12)
    for name, parameter in small.named_parameters():
        if parameter.shape == theirs[name].shape:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-10, atol=1e-12)
    assert sgfx.verify(model, small, IMAGES).max_error < 1e-14


def test_sizes_that_take_another_way_through_the_code_are_right_too():
    model, small = compiled(UNTRACEABLE["dynamic"])
    reference = masked_by_hand(model, small).eval()
    frozen = sgfx.freeze(small.eval(), IMAGES, strategy="library")
    for size in ((16, 16), (17, 20), (9, 31)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        assert difference(reference, small, images) < 1e-14
        assert difference(frozen, small, images) < 1e-14


def test_names_attributes_and_hooks_stay():
    model = dense(TRACED["norm"])
    seen = []
    handle = model.layer.register_forward_hook(lambda module, _, output: seen.append(output.shape))
    small = sgfx.compile(model, ratio=0.5)
    theirs = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in small.named_parameters()} == theirs
    assert "layer.norm.running_mean" in small.state_dict()
    assert "layer.weight" in small.state_dict()
    layer = small.layer
    assert (layer.stride, layer.kernel_size, layer.in_channels, layer.groups) == ((1, 1), (3, 3), 16, 1)
    assert isinstance(layer.norm, nn.BatchNorm2d)
    assert layer.bias is None
    assert layer.weight.dim() == 3
    small(IMAGES)
    handle.remove()
    assert len(seen) == 1
    assert not small.eval().layer.norm.training
    assert small.train().layer.norm.training
    assert layer._conv_forward.__func__ is nn.Conv2d._conv_forward  # what its class has can be called
    with pytest.raises(AttributeError, match="no_such"):
        layer.no_such  # noqa: B018


def test_what_a_forward_sets_on_the_layer_stays_there():
    _, small = compiled(TRACED["counting"])
    assert small.layer.calls == 0
    assert small.layer.seen == 0
    small.train()(IMAGES)
    small.eval()(IMAGES)
    assert small.layer.calls == 2
    assert small.layer.seen == 1
    small.layer.stride = (2, 2)
    assert small.layer(torch.zeros(1, 16, 9, 9, dtype=torch.float64)).shape == (1, 16, 4, 4)


def test_a_norm_inside_that_is_frozen_stays_so():
    """Its mode is not that of the layer."""
    model = dense(TRACED["norm"]).train()
    model.layer.norm.eval()
    small = sgfx.compile(model, groups=4, ratio=0.6, eliminate=True)
    assert small.layer.training
    assert not small.layer.norm.training
    assert not model.layer.norm.training
    statistics = small.layer.norm.running_mean.clone()
    assert difference(small, masked_by_hand(model, small)) < 1e-14
    assert torch.equal(small.layer.norm.running_mean, statistics)


def test_layers_of_other_dimensions():
    torch.manual_seed(0)
    model = Others().double()
    small = sgfx.compile(model, groups=2, ratio=0.5)
    kinds = {path: type(layer).__name__ for path, layer in small.named_modules() if isinstance(layer, GroupedCustom)}
    assert set(kinds.values()) == {"GroupedCustomConv1d", "GroupedCustomConv3d", "GroupedCustomLinear"}
    assert isinstance(small.linear.gate, Grouped)
    assert small.linear.down.shape == (2, 16)
    reference = masked_by_hand(model, small)
    assert difference(reference, small) < 1e-14
    for layer in small.modules():
        if isinstance(layer, Grouped):
            layer.form = "blocks"
    assert difference(reference, small) < 1e-14
    assert sgfx.verify(model, small, IMAGES).max_error < 1e-14
    assert difference(sgfx.freeze(small.eval(), IMAGES, strategy="library"), reference.eval()) < 1e-14


@every_layer
def test_copies_pickles_and_files(make, tmp_path):
    model, small = compiled(make)
    small.eval()
    assert difference(copy.deepcopy(small), small) == difference(pickle.loads(pickle.dumps(small)), small) == 0
    again = sgfx.compile(model, groups=4, ratio=0.6)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(small.state_dict())
    assert difference(again.eval(), small) == 0
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=dense(make, seed=1)).eval()
    assert difference(loaded, small) == 0
    assert isinstance(loaded.layer, GroupedCustom)
    assert loaded.float()(IMAGES.float()).dtype == torch.float32


@every_layer
def test_plain_checkpoints_and_averages(make, tmp_path):
    _, small = compiled(make)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    loaded = sgfx.load(tmp_path / "small.pth", into=dense(make, seed=1))
    average = torch.optim.swa_utils.AveragedModel(small, avg_fn=lambda a, b, _: 0.9 * a + 0.1 * b, use_buffers=True)
    for _ in range(3):
        average.update_parameters(small)
    assert difference(loaded.eval(), small.eval()) == 0
    assert difference(average.eval(), small) < 1e-12
    assert small.layer.num_groups == copy.deepcopy(small).half().layer.num_groups == 4


def test_a_file_does_not_fit_another_subclass(tmp_path):
    _, small = compiled(TRACED["named"])
    sgfx.save(small, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="'layer' has class Named in the file and BiasApart in the model"):
        sgfx.load(tmp_path / "small.safetensors", into=dense(TRACED["bias"]))


def test_in_place_everything_else_stays_the_same_object():
    model = dense(TRACED["norm"])
    norm, activation = model.layer.norm, model.layer.activation
    expected = sgfx.compile(model, ratio=0.5)
    assert sgfx.compile(model, ratio=0.5, inplace=True) is model
    assert model.layer.norm is norm
    assert model.layer.activation is activation
    assert difference(model.eval(), expected.eval()) == 0


@every_layer
def test_pruned_in_steps(make):
    pruner = sgfx.Pruner(dense(make), groups=4, ratio=0.6, step=0.3)
    assert isinstance(pruner.model.layer, MaskedCustom)
    assert isinstance(pruner.model.layer, nn.Conv2d)
    weight = pruner.model.layer.weight
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=1e-3)
    for _ in pruner:
        optimizer.zero_grad()
        pruner.model.train()(IMAGES).square().sum().backward()
        optimizer.step()
        again = sgfx.Pruner(dense(make), groups=4, ratio=0.6, step=0.3)
        again.load_state_dict(pruner.state_dict())
        assert difference(again.model.eval(), pruner.model.eval()) == 0
    assert pruner.model.layer.weight is weight
    masked = copy.deepcopy(pruner.model)
    assert difference(pruner.lower(), masked) < 1e-14


@every_layer
def test_frozen(make):
    model, small = compiled(make)
    reference = masked_by_hand(model, small).eval()
    assert difference(sgfx.freeze(small, IMAGES, strategy="library"), reference) < 1e-13
    assert difference(sgfx.freeze(model, IMAGES, strategy="library"), model.eval()) < 1e-13


def test_a_norm_and_an_activation_inside_are_fused():
    _, small = compiled(TRACED["norm"])
    frozen = sgfx.freeze(small, IMAGES, strategy="library")
    assert frozen.get_submodule("frozen.layer").activation == "relu"
    called = [str(node.target) for node in frozen.graph.nodes if node.op == "call_module"]
    assert not any("norm" in name for name in called)


@every_layer
@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_exported(make, form, tmp_path):
    _, small = compiled(make)
    small.float().eval()
    written = sgfx.export(small, tmp_path / "small.pt2", IMAGES.float(), form=form)
    assert written.max_difference < 1e-6
    program = torch.export.load(tmp_path / "small.pt2")
    names = {str(node.target) for node in program.graph.nodes}
    assert any("index_select" in name for name in names) == (form == "blocks")
    if form == "blocks":
        assert max(tensor.numel() for tensor in program.state_dict.values()) < 16 * 16 * 9


@every_layer
def test_eliminated(make, tmp_path):
    model, small = compiled(make, ratio=0.9, eliminate=True)
    assert sgfx.verify(model, small, IMAGES).max_error < 1e-13
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=dense(make, seed=1))
    assert difference(loaded.eval(), small.eval()) == 0
    assert difference(sgfx.freeze(small, IMAGES, strategy="library"), small) < 1e-13


def test_elimination_cuts_a_subclass_with_the_norm_inside():
    model, small = compiled(TRACED["norm"], groups=2, ratio=0.9, eliminate=True)
    left = small.layer.out_channels
    assert left < 16
    assert small.layer.norm.num_features == left
    assert len(small.layer.norm.running_mean) == left
    assert small.layer.in_channels == small.stem.out_channels < 16
    assert sgfx.verify(model, small, IMAGES).max_error < 1e-13


def test_layers_that_give_several_tensors():
    class Two(Around):
        def forward(self, x):
            y, mean = self.layer(self.stem(x).relu())
            return self.last(self.next(y).relu().mean((2, 3))) + mean

    torch.manual_seed(0)
    model = Two(layers.WithMean(16, 16, 3)).double()
    for options in ({"ratio": 0.6}, {"ratio": 0.9, "eliminate": True}):
        small = sgfx.compile(model, groups=4, **options)
        assert sgfx.plans(small)["layer"].grouped
        assert sgfx.verify(model, small, IMAGES).max_error < 1e-13
        assert difference(sgfx.freeze(small, IMAGES, strategy="library"), small.eval()) < 1e-13


def test_a_dense_subclass_is_cut_too():
    model, small = compiled(TRACED["norm"], groups=2, ratio=0.9, eliminate=True, ignore="layer")
    assert type(small.layer) is layers.WithNorm
    assert small.layer.weight.shape[0] == small.layer.norm.num_features < 16
    assert sgfx.verify(model, small, IMAGES).max_error < 1e-13


@every_layer
def test_calibrated(make):
    model, small = compiled(make, ratio=0.5)
    data = torch.randn(64, 3, 16, 16, dtype=torch.float64)
    model.eval(), small.eval()
    before, kept = difference(model, small, data), small.layer.weight.clone()
    sgfx.calibrate(model, small, data)
    assert difference(model, small, data) < 0.8 * before
    assert not torch.equal(small.layer.weight, kept)


@pytest.mark.parametrize("size", [7, 8])
def test_calibration_finds_the_same_weights_behind_untraceable_code(size):
    """The same network, with what its code computes for this size written down."""
    model = dense(UNTRACEABLE["dynamic"])
    model.stem.padding = (1, 1)
    left = (size % 2 == 1) * 1  # of the padding; on the right there is one anyway
    written = copy.deepcopy(model)
    written.layer = nn.Conv2d(16, 16, 3, 2)
    written.stem = nn.Sequential(model.stem, nn.ReLU(), nn.ZeroPad2d((left, 1, left, 1)))
    written.double().load_state_dict({k.replace("stem", "stem.0"): v for k, v in model.state_dict().items()})
    data = torch.randn(8, 3, size, size, dtype=torch.float64)
    assert difference(model, written, data) < 1e-14
    found = [sgfx.calibrate(each, sgfx.compile(each, groups=4, ratio=0.6), data) for each in (model, written)]
    for path in ("layer", "next", "last"):
        mine, theirs = (each.get_submodule(path) for each in found)
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(mine.bias, theirs.bias, rtol=1e-9, atol=1e-11)


def test_reports_count_the_blocks():
    model, small = compiled(UNTRACEABLE["checked"])
    report = {layer.path: layer for layer in sgfx.report(model, small, IMAGES).layers}
    plan = sgfx.plans(small)["layer"]
    assert report["layer"].macs == len(IMAGES) * plan.connections * 9 * 12 * 12
    assert report["layer"].kind == "Conv2d"
    assert report["layer"].params == plan.connections * 9 + 16 + 32


def test_torch_compile_takes_a_regrouped_subclass_whole():
    _, small = compiled(TRACED["norm"])
    fast = torch.compile(small.eval(), backend="eager", fullgraph=True)
    assert difference(fast, small) == 0
