"""The inference form: the same outputs as the eval form, whatever is fused, and nothing of the model changed."""

import copy
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models_zoo
import sgfx
import sgfx.freezing
from passes.errors import InputError
from passes.freezing.arranging.placing import beside_rows
from passes.freezing.choosing.recipe import FusedNorm, LibraryLayer
from passes.kernel import Margins, PackedConv2d, supported
from passes.kernel.layout.geometry import Geometry
from passes.kernel.layout.schedule import Job, Tiling, schedule
from passes.kernel.packed_chain import PackedChain
from passes.kernel.program import Wires

needs_kernel = pytest.mark.skipif(supported() is not None, reason="the kernel does not run here")


def trained(model, seed=0):
    """Norm statistics and weights as training leaves them: far from the identity."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@torch.no_grad()
def error(frozen, model, *inputs):
    expected, given = model(*inputs), frozen(*inputs)
    return float((given - expected).abs().max() / expected.abs().max())


class Block(nn.Module):
    """Norms, activations, a sum with a shortcut, a pooling, dropout and a head; `join` is how the sum is written."""

    def __init__(self, join=operator.add, act=nn.ReLU):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.act = nn.MaxPool2d(3, 2, 1), act(inplace=True)
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.down_norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.last_norm, self.drop, self.head = nn.BatchNorm2d(16), nn.Dropout(), nn.Linear(16, 6)
        self.join = join

    def forward(self, x):
        x = self.pool(self.act(self.stem_norm(self.stem(x))))
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        x = self.act(self.join(y, self.down_norm(self.down(x))))
        x = F.dropout(x + 1, 0.5, self.training)
        return self.head(self.drop(F.relu(self.last_norm(x)).mean((2, 3))))


IMAGES = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strategy", [None, "library", pytest.param("kernel", marks=needs_kernel)])
@pytest.mark.parametrize("join", [operator.add, operator.iadd, torch.add, lambda a, b: a.add_(b), lambda a, b: b + a])
def test_frozen_equals_eval_for_this_shape_and_others(strategy, join):
    model = trained(Block(join))
    small = sgfx.compile(model, groups=3, ratio=0.5)
    before = copy.deepcopy(small.state_dict())
    for each in (model, small):
        frozen = sgfx.freeze(each, IMAGES, strategy=strategy)
        assert error(frozen, each, IMAGES) < 1e-5
        assert error(frozen, each, torch.randn(3, 3, 33, 14)) < 1e-5
        assert error(frozen, each, torch.randn(1, 3, 7, 7)) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_norms_sums_and_activations_move_into_the_layers(act):
    frozen = sgfx.freeze(trained(Block(act=act)), IMAGES, strategy="library")
    modules = [type(module) for module in frozen.modules()]
    assert nn.BatchNorm2d not in modules
    assert act not in modules
    assert nn.Dropout not in modules
    assert modules.count(FusedNorm) == 1  # the one that no layer stands before
    names = [node.name for node in frozen.graph.nodes]
    assert sum("add" in name for name in names) == 1  # the one with a constant
    assert not any("dropout" in name for name in names)


def test_what_computes_in_place_on_a_tensor_that_others_read_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            x += y  # from here on, x is the sum
            z = torch.relu_(x)
            return x * 2 + z + y

    model = trained(Model())
    for strategy in ("library", None):
        assert error(sgfx.freeze(model, IMAGES, strategy=strategy), model, IMAGES) < 1e-6


def test_a_layer_called_twice_and_a_sum_with_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.norm(self.a(torch.relu(self.a(x))))
            return y + y

    model = trained(Model())
    frozen = sgfx.freeze(model, IMAGES, strategy="library")
    assert error(frozen, model, IMAGES) < 1e-6
    assert set(frozen.decisions.layers) == {"a", "a#2"}


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_other_layers_are_left_to_the_library(padding_mode):
    conv = nn.Conv2d(6, 8, 3, padding=1, padding_mode=padding_mode)
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), conv, nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4)))
    small = sgfx.compile(model, groups=2, ratio=0.5)
    for each in (model, small):
        assert error(sgfx.freeze(each, IMAGES), each, IMAGES) < 1e-5


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = trained(nn.Sequential(conv(4, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 1)))
    small = sgfx.compile(model, groups=2, ratio=0.5)
    assert error(sgfx.freeze(small, torch.randn(2, 4, *[6] * dims)), small, torch.randn(2, 4, *[6] * dims)) < 1e-5


@needs_kernel
def test_layers_between_packed_ones_write_into_padded_planes():
    small = sgfx.compile(trained(models_zoo.create("resnet20")), groups=4, ratio=0.5)
    images = torch.randn(2, 3, 32, 32)
    frozen = sgfx.freeze(small, images, strategy="kernel")
    packed = [module for module in frozen.modules() if type(module) is PackedConv2d]
    assert sum(module.form.placement.writes.top > 0 for module in packed) >= 9
    assert error(frozen, small, images) < 1e-5
    assert error(frozen, small, torch.randn(1, 3, 40, 24)) < 1e-5


class Bottlenecks(nn.Module):
    """Two blocks as ResNet-50 has them, the second with a stride, between layers that no kernel reads."""

    def __init__(self):
        super().__init__()
        for block, (inputs, stride) in enumerate(((8, 1), (16, 2))):
            self.add_module(f"narrow{block}", nn.Conv2d(inputs, 8, 1))
            self.add_module(f"wide{block}", nn.Conv2d(8, 8, 3, stride, 1))
            self.add_module(f"out{block}", nn.Conv2d(8, 16, 1))
            self.add_module(f"down{block}", nn.Conv2d(inputs, 16, 1, stride))

    def forward(self, x):
        for block in range(2):
            layers = dict(self.named_children())
            y = F.relu(layers[f"wide{block}"](F.relu(layers[f"narrow{block}"](x))))
            x = F.relu(layers[f"out{block}"](y) + layers[f"down{block}"](x))
        return x.mean((2, 3))


class Taps(nn.Module):
    """Three convolutions of which a later operation reads two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))

    def forward(self, x):
        first = self.a(x)
        second = self.b(first)
        third = self.c(second) + first
        return self.d(torch.tanh(first)), third


@needs_kernel
def test_layers_that_follow_each_other_run_in_one_call():
    model, images = Taps().eval(), torch.randn(2, 6, 9, 9)
    frozen = sgfx.freeze(model, images, strategy="kernel")
    chains = [module for module in frozen.modules() if type(module) is PackedChain]
    assert [(chain.wires, chain.outputs) for chain in chains] == [((Wires(0), Wires(1), Wires(2, 1)), (0, 2))]
    with torch.no_grad():
        for result, expected in zip(frozen(images), model(images), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_margins_are_those_that_rows_leave_anyway():
    model = sgfx.compile(trained(Bottlenecks()), groups=2, ratio=0.3, ignore=["down*"])
    images = torch.randn(2, 8, 30, 30)
    frozen = sgfx.freeze(model, images, strategy="kernel")
    assert error(frozen, model, images) < 1e-5
    assert error(frozen, model, torch.randn(1, 8, 13, 40)) < 1e-5
    placed = {module.path: module.form.placement for module in frozen.modules() if type(module) is PackedConv2d}
    assert placed["narrow0"].writes == Margins(2, 1, 1) == placed["wide0"].reads
    assert placed["wide0"].writes == Margins(right=1) == placed["out0"].reads
    assert placed["out0"].writes == Margins(right=1) == placed["down1"].reads == placed["narrow1"].reads
    assert placed["wide1"].writes == Margins(right=1) == placed["out1"].reads
    assert placed["down1"].writes == Margins(right=1) == placed["out1"].adds
    assert placed["out1"].writes == Margins()  # a mean reads it


@needs_kernel
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("reads", [Margins(), Margins(2, 1, 1), Margins(0, 0, 1), Margins(4, 4, 3)])
def test_pixels_beside_rows_are_those_of_the_schedule(size, stride, padding, reads):
    geometry = Geometry(4, 4, (size, size), (stride, stride), (padding,) * 4)
    job = Job(geometry, Tiling(), 1, 20, 20, reads, None, Margins(), 1, 8, 1)
    found = schedule(job).template
    assert beside_rows(geometry, reads) == found.row - found.columns


def test_frozen_models_can_be_pickled_and_copied():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(twin(IMAGES), frozen(IMAGES))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert any(isinstance(module, LibraryLayer | PackedConv2d) for module in frozen.modules())


def test_hooks_are_not_part_of_it_and_modes_stay():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5).train()
    seen = []
    small.conv1.register_forward_hook(lambda *_: seen.append(1))
    frozen = sgfx.freeze(small, IMAGES, strategy="library")
    frozen(IMAGES)
    assert not seen
    assert small.training
    assert not frozen.training


def test_eliminated_models_are_frozen_too():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.9, eliminate=True)
    assert error(sgfx.freeze(small, IMAGES), small, IMAGES) < 1e-5


def test_bad_input():
    model = trained(Block())
    with pytest.raises(InputError, match="strategy must be 'library' or 'kernel' or None, not 'fast'"):
        sgfx.freeze(model, IMAGES, strategy="fast")
    with pytest.raises(TypeError, match=r"decisions must be those of a frozen model, or their to_dict\(\), not int"):
        sgfx.freeze(model, IMAGES, decisions=3)
    with pytest.raises(InputError, match="give only one of them"):
        sgfx.freeze(model, IMAGES, strategy="library", decisions=sgfx.Decisions("", {}))
    with pytest.raises(InputError, match="these are no decisions"):
        sgfx.freeze(model, IMAGES, decisions={"version": 1})
    with pytest.raises(InputError, match="decisions have version 99, this sgfx reads version 1"):
        sgfx.freeze(model, IMAGES, decisions={"version": 99})
    with pytest.raises(InputError, match="do not fit the model at layer 'stem'"):
        sgfx.freeze(model, torch.zeros(2, 4, 8, 8))
    with pytest.raises(InputError, match="freeze needs example_inputs"):
        sgfx.freeze(model, None)
    with pytest.raises(InputError, match="do not fit the model at layer 'conv2'"):
        sgfx.freeze(model, IMAGES.half())
    frozen = sgfx.freeze(model, IMAGES)
    with pytest.raises(InputError, match=r"frozen already, at '0\..*': freeze the one that it was made"):
        sgfx.freeze(nn.Sequential(frozen, nn.ReLU()), IMAGES)
    with pytest.raises(InputError, match="small is a frozen model: save the one that it was made from"):
        sgfx.save(frozen, "frozen.safetensors")
    made = frozen.decisions
    other = sgfx.Decisions(made.machine, {"other": made.layers["stem"]})
    with pytest.raises(InputError, match="decisions are of another model: this one has no layer 'other'"):
        sgfx.freeze(model, IMAGES, decisions=other)


def test_concatenations_that_grow_add_to_one_tensor():
    from passes.freezing.rewrites.concatenation import append

    model = trained(models_zoo.create("densenet_bc", depth=22, growth=6))
    small = sgfx.compile(model, groups=2, ratio=0.5)
    images = torch.randn(2, 3, 32, 32)
    frozen = sgfx.freeze(small, images, strategy="library")
    targets = [node.target for node in frozen.graph.nodes]
    assert targets.count(append) >= 6
    assert torch.cat not in targets
    assert error(frozen, small, images) < 1e-5
    assert error(frozen, small, torch.randn(3, 3, 40, 24)) < 1e-5


def test_a_concatenation_that_is_changed_in_place_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 4, 1), nn.Conv2d(11, 4, 1)

        def forward(self, x):
            first = torch.cat([x, self.a(x)], 1)
            y = self.b(first)
            first.relu_()
            return self.c(torch.cat([x, self.a(x), y], 1)) + first[:, :4]

    model = trained(Model())
    assert error(sgfx.freeze(model, IMAGES, strategy="library"), model, IMAGES) < 1e-6
