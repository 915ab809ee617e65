"""`sgfx.compile`: exact, and nothing of the user's is touched or lost."""

import copy
import gc
import io
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import models_zoo
import sgfx
from passes.layers.grouped import Grouped

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A small residual network with an attribute, a norm, dropout and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 10)
        self.out_channels = 10

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.fc((y + self.block(y)).mean((2, 3)))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def masked_by_hand(dense, small):
    """The dense model with the pruned weights set to zero, made from the plans alone."""
    twin = copy.deepcopy(dense)
    for path, plan in sgfx.plans(small).items():
        if plan.reason is None:
            weight = twin.get_submodule(path).weight
            for row, label in enumerate(plan.labels.tolist()):
                weight.data[row, ~plan.keep[label]] = 0
    return twin


def relative(actual, expected):
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max())


def set_form(model, form):
    for layer in model.modules():
        if isinstance(layer, Grouped):
            layer.form = form


def packed_gradient(weight_gradient, plan):
    """Gradient entries of the kept weights of a dense layer in the order of the packed rows."""
    rows = []
    for group in range(plan.groups):
        for filter_ in (plan.labels == group).nonzero()[:, 0].tolist():
            rows.append(weight_gradient[filter_, plan.keep[group]])
    return torch.cat(rows)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["dense", "blocks"])
@pytest.mark.parametrize("name", ["resnet20", "densenet_bc", "lenet5"])
def test_whole_networks_equal_the_masked_ones(name, form, training):
    torch.manual_seed(0)
    options = {"depth": 16, "growth": 6} if name == "densenet_bc" else {}
    dense = models_zoo.create(name, **options).double()
    small = sgfx.compile(dense, groups=4, ratio=0.7)
    masked = masked_by_hand(dense, small)
    set_form(small, form)
    size, channels = (32, 1) if name == "lenet5" else (8, 3)
    images = torch.randn(4, channels, size, size, dtype=torch.float64)
    outputs = []
    for model in (masked, small):
        model.train(training)
        outputs.append(model(images))
        outputs[-1].square().sum().backward()
    assert relative(outputs[1], outputs[0]) < 1e-10
    for path, plan in sgfx.plans(small).items():
        expected = masked.get_submodule(path).weight.grad
        if plan.reason is None:
            expected = packed_gradient(expected, plan)
        actual = small.get_submodule(path).weight.grad.view_as(expected)
        assert float((actual - expected).abs().max()) <= 1e-10 * float(expected.abs().max().clamp(min=1e-12))


def test_single_precision_networks_agree_to_their_own_bound():
    dense = models_zoo.create("resnet20").eval()
    small = sgfx.compile(dense, ratio=0.5)
    images = torch.randn(4, 3, 16, 16)
    expected = masked_by_hand(dense, small)(images)
    for form in ("dense", "blocks"):
        set_form(small, form)
        assert relative(small(images), expected) < 1e-4


def test_the_original_is_neither_run_nor_changed():
    model = net()
    fired = []
    model.register_forward_hook(lambda *_: fired.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, modules = list(model.parameters()), list(model.modules())
    sgfx.compile(model, ratio=0.5, example_inputs=IMAGES)
    assert fired == []
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sgfx.plans(model) == {}


def test_the_result_is_of_the_same_class_with_its_attributes_and_untouched_parameters():
    model = net()
    model.block.tag = {"stage": 1}
    model.block[0].tag = "first"
    small = sgfx.compile(model, ratio=0.5)
    assert type(small) is Net
    assert (small.out_channels, small.block.tag, small.block[0].tag) == (10, {"stage": 1}, "first")
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in small.named_parameters()] == names
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "fc.bias", "block.0.bias"):
        assert torch.equal(small.get_parameter(name), model.get_parameter(name))
        assert small.get_parameter(name) is not model.get_parameter(name)


def test_attributes_that_code_asks_layers_for_are_there():
    small = sgfx.compile(net(), ratio=0.5)
    conv, linear = small.block[0], small.fc
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (8, 8, (3, 3), (1, 1))
    assert (conv.padding, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), "zeros")
    assert (linear.in_features, linear.out_features) == (8, 10)
    assert "groups=8" in repr(conv)


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
def test_modes_are_kept_per_module(mode):
    model = net().train(mode != "eval")
    if mode == "mixed":
        model.bn1.eval()
        model.block[0].eval()
    modes = {path: module.training for path, module in model.named_modules()}
    small = sgfx.compile(model, ratio=0.5)
    assert {path: module.training for path, module in small.named_modules()} == modes
    assert {path: module.training for path, module in model.named_modules()} == modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_type_and_requires_grad_are_kept(dtype):
    model = net(dtype)
    model.block[0].weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    small = sgfx.compile(model, ratio=0.5)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == kept
    assert small(IMAGES.to(dtype)).dtype == dtype


class Tap:
    """A hook that keeps what it sees, as feature taps do: with a gradient history it can't be deep-copied."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, args, output):
        self.seen.append(output)


def test_hooks_move_along_by_reference_and_fire():
    model = net()
    tap = Tap()
    model.block[0].register_forward_hook(tap)
    model(IMAGES)  # the tap holds an activation now
    small = sgfx.compile(model, ratio=0.5)
    assert list(small.block[0]._forward_hooks.values()) == [tap]
    assert len(tap.seen) == 1
    small(IMAGES)
    assert len(tap.seen) == 2
    assert tap.seen[1].shape == tap.seen[0].shape


class SelfTapping(Net):
    """A model that registers a method of its own as a hook."""

    def __init__(self):
        super().__init__()
        self.features = None
        self.block.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.features = output


def test_a_hook_that_is_a_method_of_the_model_belongs_to_the_copy():
    model = SelfTapping().double()
    small = sgfx.compile(model, ratio=0.5)
    small(IMAGES)
    assert model.features is None
    assert small.features is not None


def test_every_tensor_keeps_its_channels_and_their_order():
    model = net().eval()
    small = sgfx.compile(model, ratio=0.5)
    taps = []
    for each in (masked_by_hand(model, small), small):
        taps.append(Tap())
        for module in each.modules():
            module.register_forward_hook(taps[-1])
        each(IMAGES)
    assert len(taps[0].seen) == len(taps[1].seen)
    for expected, actual in zip(taps[0].seen, taps[1].seen, strict=True):
        assert actual.shape == expected.shape
        assert relative(actual, expected) < 1e-10


def test_inplace_changes_the_model_itself_and_keeps_untouched_parameters():
    model = net()
    tap = Tap()
    model.block[0].register_forward_hook(tap)
    expected = sgfx.compile(model, ratio=0.5)
    kept = {name: model.get_parameter(name) for name in ("conv1.weight", "bn1.weight", "fc.bias")}
    assert sgfx.compile(model, ratio=0.5, inplace=True) is model
    assert isinstance(model.fc, Grouped)
    assert all(model.get_parameter(name) is parameter for name, parameter in kept.items())
    assert sgfx.plans(model) == sgfx.plans(expected)
    assert list(model.block[0]._forward_hooks.values()) == [tap]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_inplace_changes_nothing_on_an_error():
    model = net()
    model.fc.weight.data[0, 0] = float("nan")
    modules = list(model.modules())
    with pytest.raises(sgfx.InputError, match="layer 'fc'"):
        sgfx.compile(model, ratio=0.5, inplace=True)
    assert list(model.modules()) == modules
    assert sgfx.plans(model) == {}


def test_one_seed_gives_one_result_whatever_the_global_random_state():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = models_zoo.create("resnet20")
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = sgfx.compile(model, ratio=0.5, seed=7, example_inputs=torch.zeros(2, 3, 32, 32))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    torch.manual_seed(2)
    np.random.seed(2)
    assert sgfx.plans(sgfx.compile(model, ratio=0.5, seed=7)) == sgfx.plans(first)
    assert sgfx.plans(sgfx.compile(model, ratio=0.5, seed=8)) != sgfx.plans(first)


def test_criteria_change_what_is_kept():
    model = net()
    kept = {}
    for criterion in ("l1", "l2", lambda weight: weight.new_ones(weight.shape[:2]).cumsum(1)):
        plan = sgfx.plans(sgfx.compile(model, groups=1, ratio=0.5, criterion=criterion))["block.0"]
        kept[criterion] = plan.keep[0].tolist()
    l1, l2, rising = kept.values()
    weight = model.block[0].weight.detach().flatten(2)
    for criterion, order in ((l1, weight.abs().sum(2)), (l2, weight.norm(dim=2))):
        best = order.mean(0).topk(4).indices
        assert sorted(best.tolist()) == [channel for channel, kept in enumerate(criterion) if kept]
    assert rising == [False] * 4 + [True] * 4


def test_requested_ratios_are_achieved_and_pruned_weights_are_gone():
    model = net()
    small = sgfx.compile(model, groups=4, ratio=0.75, linear_ratio=0.5, overrides={"block.2": {"ratio": 0.25}})
    plans = sgfx.plans(small)
    assert plans["conv1"].reason == "first convolution"
    for path, ratio in {"block.0": 0.75, "block.2": 0.25, "fc": 0.5}.items():
        plan = plans[path]
        largest = max(filters for filters, _ in plan.block_sizes) / (plan.out_channels * plan.in_channels)
        assert plan.requested_ratio == ratio
        assert abs(plan.achieved_ratio - ratio) <= largest
        dense = model.get_submodule(path).weight
        connections = int(plan.mask().sum())
        assert small.get_submodule(path).weight.shape == (connections, *(dense.shape[2:] or (1,)))
    stored = {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert not any(shape == model.get_parameter("block.0.weight").shape for shape in stored.values())


def test_nothing_keeps_the_dense_weights_alive():
    model = net()
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    small = sgfx.compile(model, ratio=0.5)
    assert not addresses & {tensor.data_ptr() for tensor in small.state_dict().values()}
    dense = [id(layer) for layer in model.modules()]
    del model
    gc.collect()
    assert not [each for each in gc.get_objects() if id(each) in dense and isinstance(each, nn.Module)]
    small(IMAGES)


def test_pickling_deepcopy_and_state_dicts():
    model = net()
    small = sgfx.compile(model, ratio=0.5)
    expected = small.eval()(IMAGES)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(IMAGES), expected)
        assert sgfx.plans(twin) == sgfx.plans(small)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    again = sgfx.compile(model, ratio=0.5).eval()
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(IMAGES), expected)


def test_a_state_dict_of_another_structure_is_refused():
    model = net()
    small = sgfx.compile(model, groups=1, ratio=0.5)
    for layer in (model.block[0], model.block[2], model.fc):
        layer.weight.data = layer.weight.data.flip(1)  # the same shapes, other channels
    other = sgfx.compile(model, groups=1, ratio=0.5)
    with pytest.raises(RuntimeError, match=r"block\.0\.inputs differs: the weights belong to a layer that was grouped"):
        small.load_state_dict(other.state_dict())


def test_torch_compile_of_the_result_agrees():
    small = sgfx.compile(net(torch.float32), ratio=0.5).eval()
    for form in ("dense", "blocks"):
        set_form(small, form)
        torch._dynamo.reset()
        fast = torch.compile(small, backend="aot_eager", fullgraph=True)
        assert relative(fast(IMAGES.float()), small(IMAGES.float())) < 1e-5


def test_a_compiled_backbone_keeps_its_plans_inside_a_larger_model():
    backbone = sgfx.compile(net(), ratio=0.5)
    detector = nn.Sequential(backbone, nn.Linear(10, 8).double())
    assert sgfx.plans(detector) == {f"0.{path}": plan for path, plan in sgfx.plans(backbone).items()}
    whole = sgfx.compile(detector, ratio=0.3)
    assert sgfx.plans(whole)["1"].requested_ratio == 0.3
    assert sgfx.plans(whole)["0.fc"] == sgfx.plans(backbone)["fc"]
    assert relative(whole[0](IMAGES), backbone(IMAGES)) < 1e-12


def test_training_goes_on_after_compiling():
    small = sgfx.compile(net(), ratio=0.5)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(small(IMAGES), torch.arange(4)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_steps_in_one_call_equal_the_loop():
    def nudge(model, step):
        with torch.no_grad():
            model.block[0].weight.mul_(1 + 0.1 * step.index).add_(0.01)

    small = sgfx.compile(net(), groups=3, ratio=0.6, step=0.25, finetune=nudge)
    pruner = sgfx.Pruner(net(), groups=3, ratio=0.6, step=0.25)
    for step in pruner:
        nudge(pruner.model, step)
    expected = pruner.lower()
    assert sgfx.plans(small) == sgfx.plans(expected)
    assert torch.equal(small(IMAGES), expected(IMAGES))


def test_inplace_with_steps_brings_what_was_trained():
    def train(model, step):
        with torch.no_grad():
            model.bn1.weight.add_(1)
            model.bn1.running_mean.add_(1)

    model = net()
    weight, before = model.bn1.weight, model.bn1.weight.clone()
    assert sgfx.compile(model, ratio=0.5, step=0.25, finetune=train, inplace=True) is model
    assert model.bn1.weight is weight
    assert torch.equal(weight, before + 2)
    assert torch.equal(model.bn1.running_mean, torch.full((8,), 2.0, dtype=torch.float64))
    assert isinstance(model.fc, Grouped)


@pytest.mark.parametrize("inplace", [False, True])
def test_modes_are_kept_whatever_finetune_leaves(inplace):
    model = net().eval()
    model.bn1.train()
    small = sgfx.compile(model, ratio=0.5, step=0.25, finetune=lambda masked, step: masked.train(), inplace=inplace)
    assert [path for path, module in small.named_modules() if module.training] == ["bn1"]


def test_inplace_keeps_the_handles_of_hooks():
    model, calls = net(), []
    handle = model.block[0].register_forward_hook(lambda *_: calls.append(1))
    sgfx.compile(model, ratio=0.5, inplace=True)
    model(IMAGES)
    handle.remove()
    model(IMAGES)
    assert calls == [1]


def test_inplace_leaves_tensors_alone_that_can_not_be_written_to():
    with torch.inference_mode():
        model = net().eval()
    model.register_buffer("anchors", torch.ones(1, 4).expand(3, 4))
    expected = sgfx.compile(model, ratio=0.5)
    with torch.no_grad():
        assert torch.equal(sgfx.compile(model, ratio=0.5, inplace=True)(IMAGES), expected(IMAGES))


def test_what_is_compiled_or_loaded_in_inference_mode_can_be_trained(tmp_path):
    model = net()
    with torch.inference_mode():
        small = sgfx.compile(model, ratio=0.5)
        sgfx.save(small, tmp_path / "small.safetensors")
        sgfx.load(tmp_path / "small.safetensors", into=model)
        idle = sgfx.load(tmp_path / "small.safetensors", into=net())  # made here, so for inference alone
        assert torch.equal(idle.eval()(IMAGES), small.eval()(IMAGES))
    for each in (small, model):
        each.train()(IMAGES).sum().backward()
        assert all(parameter.grad is not None for parameter in each.parameters())


def test_the_default_device_has_no_say():
    model = net()
    expected = sgfx.compile(model, ratio=0.5)
    with torch.device("meta"):
        small = sgfx.compile(model, ratio=0.5)
    assert torch.equal(small(IMAGES), expected(IMAGES))


def test_an_error_in_finetune_carries_the_pruner_that_goes_on():
    calls = []

    def fail_once(model, step):
        calls.append(step.index)
        if calls == [1, 2]:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full") as error:
        sgfx.compile(net(), ratio=0.6, step=0.2, finetune=fail_once)
    assert "finetune failed at step 2 of 3" in error.value.__notes__[0]
    assert [step.index for step in error.value.pruner] == [2, 3]
    assert isinstance(error.value.pruner.lower().fc, Grouped)
