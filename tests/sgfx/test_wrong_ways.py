"""Models and calls that can't be taken as they are: the message says what to do, or they are taken all the same."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import sgfx
from passes.layers.grouped import Grouped

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.block(torch.relu(self.bn(self.conv1(x)))).mean((2, 3)))


class Checkpointed(Net):
    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(checkpoint(self.block, x, use_reentrant=True).mean((2, 3)))


class Dropping(Net):
    """Drops by functions, as much code does."""

    def forward(self, x):
        y = F.dropout2d(torch.relu(self.bn(self.conv1(x))), 0.3, self.training)
        return self.fc(F.dropout(self.block(F.alpha_dropout(y, 0.3, self.training)).mean((2, 3)), 0.3, self.training))


class Targets(Net):
    def forward(self, x, y=None):
        if self.training:
            return F.cross_entropy(super().forward(x), y)
        return super().forward(x)


def pair(model, **options):
    torch.manual_seed(0)
    dense = model()
    return dense, sgfx.compile(dense, groups=3, ratio=0.6, **options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in eval mode: torch says so
def test_reentrant_checkpoints_are_verified():
    found = sgfx.verify(*pair(Checkpointed, example_inputs=IMAGES), IMAGES)
    assert found.max_error < 1e-6
    assert found.gradient_error < 1e-5


@pytest.mark.parametrize("eliminate", [False, True])
def test_dropout_by_function_is_no_false_alarm(eliminate):
    dense, small = pair(Dropping, example_inputs=IMAGES, eliminate=eliminate)
    found = sgfx.verify(dense, small, IMAGES)
    assert found.max_error < 1e-6
    assert found.gradient_error < 1e-5


@pytest.mark.parametrize("compiled_first", [False, True])
def test_models_in_channels_last(compiled_first):
    torch.manual_seed(0)
    dense = Net() if compiled_first else Net().to(memory_format=torch.channels_last)
    small = sgfx.compile(dense, groups=3, ratio=0.6).to(memory_format=torch.channels_last)
    found = sgfx.verify(dense.to(memory_format=torch.channels_last), small, IMAGES)
    assert found.max_error < 1e-6
    assert found.gradient_error < 1e-5
    with torch.no_grad():
        small.conv1.weight[1, 2, 0, 1] += 1
    assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6  # the reference follows


def test_inputs_that_training_does_not_take():
    dense, small = pair(Targets, example_inputs=IMAGES)
    with pytest.raises(sgfx.InputError, match=r"eval mode, but not in train mode: .* the targets of a detector"):
        sgfx.verify(dense, small, IMAGES)
    assert sgfx.verify(dense, small, (IMAGES, torch.arange(4))).max_error < 1e-6


@pytest.mark.parametrize("kind", [nn.ModuleList, Net])
def test_modules_without_a_forward(kind):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

    model = Holder() if kind is Net else nn.ModuleList([nn.Conv2d(8, 8, 1)])
    with pytest.raises(sgfx.InputError, match=r"(Holder|ModuleList) has no forward"):
        sgfx.compile(model, ratio=0.5)


@pytest.mark.parametrize("strategy", ["kernel", "library"])
def test_a_frozen_model_given_an_array(strategy):
    if strategy == "kernel":
        pytest.importorskip("numba")
    frozen = sgfx.freeze(Net(), IMAGES, strategy=strategy)
    with pytest.raises(TypeError, match="ndarray"):
        frozen(np.zeros((4, 3, 8, 8), np.float32))


@pytest.mark.filterwarnings("ignore:.*jit.script. is deprecated", "ignore:.*weight_norm. is deprecated")
@pytest.mark.filterwarnings("ignore:.*deprecated")
class TestParts:
    """What a part of a model may be."""

    def scripted(self):
        torch.manual_seed(0)
        model = Net()
        model.block = torch.jit.script(model.block)
        return model

    def test_scripted_parts_are_left_alone(self, tmp_path):
        dense = self.scripted()
        small = sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=IMAGES, overrides={"conv1": {}})
        assert [path for path, module in small.named_modules() if isinstance(module, Grouped)] == ["conv1", "fc"]
        assert sgfx.verify(dense, small, IMAGES).max_error < 1e-6
        assert all(parameter.is_leaf and parameter.requires_grad for parameter in small.parameters())
        frozen = sgfx.freeze(small, IMAGES, strategy="library")
        assert torch.allclose(frozen(IMAGES), small.eval()(IMAGES), atol=1e-6)
        sgfx.save(small, tmp_path / "small.safetensors")
        torch.manual_seed(1)
        loaded = Net()
        loaded.block = torch.jit.script(loaded.block)
        loaded = sgfx.load(tmp_path / "small.safetensors", into=loaded)
        assert torch.equal(loaded.eval()(IMAGES), small(IMAGES))

    def test_a_scripted_model_is_refused(self):
        with pytest.raises(sgfx.InputError, match="the model is TorchScript; compile the Python module"):
            sgfx.compile(torch.jit.script(Net()), ratio=0.5)

    @pytest.mark.parametrize(
        ("change", "removal"),
        [
            (weight_norm, r"remove_weight_norm\(module\)"),
            (spectral_norm, r"remove_spectral_norm\(module\)"),
            (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), r"prune\.remove\(module, 'weight'\)"),
        ],
    )
    def test_weights_that_a_hook_computes(self, change, removal):
        model = Net()
        change(model.block[2])
        model(IMAGES)
        with pytest.raises(sgfx.InputError, match=rf"'block\.2' .* by a hook, .* with torch\.nn\.utils\.{removal}"):
            sgfx.compile(model, ratio=0.5)


class TestWrappers:
    """What trainers put around a model."""

    def test_of_fabric(self):
        fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
        with pytest.raises(sgfx.InputError, match=r"wrapped in _FabricModule; compile its .module"):
            sgfx.compile(fabric.setup(Net()), ratio=0.5)

    def test_of_accelerate(self):
        state = pytest.importorskip("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)  # of another test's in this process
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(sgfx.InputError, match=r"wrapped by accelerate; compile accelerator.unwrap_model"):
            sgfx.compile(accelerator.prepare(Net()), ratio=0.5)
