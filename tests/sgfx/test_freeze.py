"""The inference form: the same outputs as the eval form, whatever is fused, and nothing of the model changed."""

import copy
import json
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
from passes.freezing.decisions import Decisions, decisions_of
from passes.freezing.fused import FusedNorm, LibraryLayer
from passes.freezing.placing import beside_rows
from passes.kernel import Margins, PackedConv2d, supported
from passes.kernel.chain import PackedChain
from passes.kernel.geometry import Geometry
from passes.kernel.program import Wires
from passes.kernel.schedule import Job, Tiling, schedule

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


def test_double_precision_is_left_to_the_library():
    model = trained(Block().double())
    assert error(sgfx.freeze(model, IMAGES.double()), model, IMAGES.double()) < 1e-12


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
        return self.d(torch.sigmoid(first)), third


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


def test_decisions_are_kept_and_taken_without_measuring(monkeypatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    made = frozen.decisions
    assert decisions_of(small) is made
    assert made.layers["conv2"].milliseconds[made.layers["conv2"].name] > 0
    assert made.layers["stem"].macs == 2 * 20 * 20 * 8 * 27
    assert "conv2" in str(made)
    again = Decisions.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    monkeypatch.setattr("passes.freezing.choosing._measured", lambda *_: pytest.fail("measured"))
    for decisions in (None, made, made.to_dict()):
        other = sgfx.freeze(small, IMAGES, decisions=decisions)
        assert {path: layer.name for path, layer in other.decisions.layers.items()} == {
            path: layer.name for path, layer in made.layers.items()
        }
        assert error(other, small, IMAGES) < 1e-5


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


class Wrapper(nn.Module):
    """A detector in small: untraceable around a traceable backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = Block()
        self.backbone.out_channels = 6

    def forward(self, images):
        return torch.cat([self.backbone(image[None]) for image in images]) * self.backbone.out_channels


def test_a_model_of_several_regions_stays_of_its_class():
    model = trained(Wrapper())
    small = sgfx.compile(model, groups=3, ratio=0.5, example_inputs=IMAGES)
    frozen = sgfx.freeze(small, IMAGES)
    assert type(frozen) is Wrapper
    assert type(small.backbone) is Block
    assert frozen.backbone.out_channels == 6
    assert error(frozen, small, IMAGES) < 1e-5


@needs_kernel
def test_regrouped_layers_outside_every_region_are_frozen_alone():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), 2.0

        def forward(self, images):
            found = [self.head(self.conv(image[None])) for image in images]
            return torch.cat(found) * self.head.out_channels

    model = trained(Loop())
    small = sgfx.compile(model, groups=3, ratio=0.5, example_inputs=IMAGES, overrides={"head": {"ratio": 0.5}})
    assert sgfx.plans(small)["head"].grouped
    frozen = sgfx.freeze(small, IMAGES, strategy="kernel")
    assert error(frozen, small, IMAGES) < 1e-5
    assert frozen.decisions.layers["head"].way == "kernel"
    assert error(sgfx.freeze(small, IMAGES), small, torch.randn(3, 3, 9, 12)) < 1e-5


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
    with pytest.raises(InputError, match=r"frozen already, at '0\.frozen\.stem': freeze the one that it was made"):
        sgfx.freeze(nn.Sequential(frozen, nn.ReLU()), IMAGES)
    with pytest.raises(InputError, match="small is a frozen model: save the one that it was made from"):
        sgfx.save(frozen, "frozen.safetensors")
    made = frozen.decisions
    other = sgfx.Decisions(made.machine, {"other": made.layers["stem"]})
    with pytest.raises(InputError, match="decisions are of another model: this one has no layer 'other'"):
        sgfx.freeze(model, IMAGES, decisions=other)


def test_examples_without_images_in_them():
    model = trained(Block())
    for strategy in (None, "kernel", "library"):
        frozen = sgfx.freeze(model, IMAGES[:0], strategy=strategy)
        assert error(frozen, model, IMAGES) < 1e-5
        assert frozen(IMAGES[:0]).shape == (0, 6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision_is_left_to_the_library(dtype, tolerance):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5).to(dtype)
    frozen = sgfx.freeze(small, IMAGES.to(dtype))
    assert error(frozen, small, IMAGES.to(dtype)) < tolerance
    assert not any(isinstance(module, PackedConv2d) for module in frozen.modules())


def test_decisions_travel_in_files(tmp_path, monkeypatch):
    model = trained(Block())
    small = sgfx.compile(model, groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=trained(Block()))
    assert decisions_of(loaded) == frozen.decisions
    monkeypatch.setattr("passes.freezing.choosing._measured", lambda *_: pytest.fail("measured"))
    assert torch.equal(sgfx.freeze(loaded, IMAGES)(IMAGES), frozen(IMAGES))


def test_what_was_decided_on_another_machine_does_not_hold_here(monkeypatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    monkeypatch.setattr("sgfx.freezing.machine", lambda: "another machine")
    measured = []
    measure = "passes.freezing.choosing._measured"
    monkeypatch.setattr(measure, lambda candidates, inputs: measured.append(1) or dict.fromkeys(candidates, 1.0))
    sgfx.freeze(small, IMAGES)
    assert measured


def test_concatenations_that_grow_add_to_one_tensor():
    from passes.freezing.joining import append

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


def test_a_forced_strategy_comes_before_decisions_that_came_with_the_model():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    ways = {layer.way for layer in sgfx.freeze(small, IMAGES, strategy="library").decisions.layers.values()}
    assert ways == {"library"}


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 5, 5, 8), (8,)])
def test_linear_layers_on_any_number_of_dimensions(shape):
    model = trained(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6)))
    x = torch.randn(shape)
    for strategy in (None, "library"):
        assert error(sgfx.freeze(model, x, strategy=strategy), model, x) < 1e-5


def shifted(x, sizes):
    """Writes to its list argument, as Swin3d's attention does."""
    sizes[0] += 1
    return x[:, :, : sizes[0]]


torch.fx.wrap("shifted")


def test_functions_that_write_to_their_lists():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return shifted(self.conv(x), [5, 5])

    model = trained(Model())
    assert error(sgfx.freeze(model, IMAGES, strategy="library"), model, IMAGES) < 1e-6


def test_a_model_is_fused_once_and_a_dense_one_is_not_searched_for_filters(monkeypatch):
    done = []
    for name in ("fuse", "run_passes"):
        function = getattr(sgfx.freezing, name)
        monkeypatch.setattr(f"sgfx.freezing.{name}", lambda *args, f=function, n=name: done.append(n) or f(*args))
    model = trained(Block())
    sgfx.freeze(model, IMAGES)
    assert done == ["fuse"]
    sgfx.freeze(sgfx.compile(model, groups=3, ratio=0.5), IMAGES)
    assert done == ["fuse", "run_passes", "fuse"]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_the_kernels(dtype):
    model = trained(Block())
    frozen = sgfx.freeze(model, IMAGES, strategy="kernel")
    with torch.no_grad():
        expected = frozen(IMAGES)
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad(), torch.device("meta"):
            assert torch.equal(frozen(IMAGES), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_keep_their_decisions():
    frozen = sgfx.freeze(trained(Block()), IMAGES, strategy="library")
    assert copy.deepcopy(frozen).decisions == frozen.decisions


def test_decisions_that_came_with_a_model_are_taken_for_the_same_layers_and_sizes_alone():
    dense = trained(Block())
    made = sgfx.freeze(dense, IMAGES).decisions
    assert sgfx.freeze(dense, IMAGES).decisions.layers == made.layers
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    for model, images in ((small, IMAGES), (dense, IMAGES[:1])):
        found = sgfx.freeze(model, images).decisions
        for path in ("conv1", "conv2", "down"):
            assert found.layers[path].macs < made.layers[path].macs
            assert found.layers[path].milliseconds != made.layers[path].milliseconds


def test_decisions_given_for_other_sizes_keep_the_ways_and_not_the_times():
    model = trained(Block())
    made = sgfx.freeze(model, IMAGES).decisions
    found = sgfx.freeze(model, IMAGES[:1], decisions=made).decisions
    for path in ("stem", "conv1", "conv2", "down"):
        assert found.layers[path].name == made.layers[path].name
        assert found.layers[path].macs == made.layers[path].macs // 2
        assert not found.layers[path].milliseconds


def test_decisions_of_other_sizes_with_as_many_macs_are_not_taken():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    made = sgfx.freeze(model, torch.rand(4, 3, 16, 16)).decisions
    found = sgfx.freeze(model, torch.rand(1, 3, 32, 32)).decisions
    assert found.layers["0"].macs == made.layers["0"].macs
    assert found.layers["0"].shape == (1, 3, 32, 32)
    assert found.layers["0"].milliseconds != made.layers["0"].milliseconds


def pretend(monkeypatch, fastest: dict[str, float], whole: dict[str, float] | None = None) -> None:
    """Let candidates take the milliseconds of their ways, and whole models those of their names."""
    monkeypatch.setattr(
        "passes.freezing.choosing._measured",
        lambda candidates, _: {name: fastest.get(name.split()[0], 9.0) for name in candidates},
    )
    if whole is not None:
        monkeypatch.setattr("sgfx.freezing._interleaved", lambda forms, _: {name: whole[name] for name in forms})


@needs_kernel
def test_a_regrouped_layer_may_be_fastest_with_its_dense_weight(monkeypatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.1)
    pretend(monkeypatch, {"dense": 1.0}, {"chosen": 1.0, "library alone": 2.0})
    frozen = sgfx.freeze(small, IMAGES)
    layers = frozen.decisions.layers
    assert {path for path, layer in layers.items() if layer.way == "dense"} == {"conv1", "conv2", "down", "head"}
    assert all(len(layer.tiling) == 2 for path, layer in layers.items() if layer.way == "dense")
    assert error(frozen, small, IMAGES) < 1e-5
    report = sgfx.report(Block(), frozen, IMAGES)
    assert report.macs < report.macs_dense  # what is pruned counts as pruned
    again = sgfx.freeze(small, IMAGES, decisions=json.loads(json.dumps(frozen.decisions.to_dict())))
    assert again.decisions.layers == layers
    assert torch.equal(again(IMAGES), frozen(IMAGES))


@needs_kernel
@pytest.mark.parametrize(
    ("whole", "ways", "note"),
    [
        ({"chosen": 1.0, "dense": 2.0, "library alone": 3.0}, {"kernel"}, ""),
        ({"chosen": 2.0, "dense": 1.0, "library alone": 3.0}, {"dense"}, "regrouping is not faster here"),
        ({"chosen": 3.0, "dense": 2.0, "library alone": 1.0}, {"library"}, "the library alone is faster"),
    ],
)
def test_a_whole_that_is_not_faster_than_dense_is_run_densely(monkeypatch, whole, ways, note):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    pretend(monkeypatch, {"kernel": 1.0, "dense": 2.0}, whole)
    frozen = sgfx.freeze(small, IMAGES)
    assert {frozen.decisions.layers[path].way for path in ("conv1", "conv2", "down")} == ways
    assert frozen.decisions.note.startswith(note)
    assert bool(frozen.decisions.note) == bool(note)
    assert frozen.decisions.milliseconds == whole
    assert error(frozen, small, IMAGES) < 1e-5
    assert sgfx.freeze(small, IMAGES).decisions.layers == frozen.decisions.layers  # they came with the model


@needs_kernel
def test_of_a_dense_model_there_is_no_denser_form(monkeypatch):
    pretend(monkeypatch, {"kernel": 1.0}, {"chosen": 1.0, "library alone": 3.0})
    frozen = sgfx.freeze(trained(Block()), IMAGES)
    assert list(frozen.decisions.milliseconds) == ["chosen", "library alone"]


@pytest.mark.parametrize(
    ("way", "tiling"), [("foo", []), ("dense", []), ("kernel", [0, 4]), ("kernel", [28]), ("library", [28, 4])]
)
def test_decisions_that_name_no_way(way, tiling):
    data = sgfx.freeze(trained(Block()), IMAGES, strategy="library").decisions.to_dict()
    data["layers"]["stem"] |= {"way": way, "tiling": tiling}
    with pytest.raises(InputError, match="the decision for layer 'stem' must be one of library, channels_last, kernel"):
        sgfx.freeze(Block().eval(), IMAGES, decisions=data)


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_hooks_compute_are_refused(change):
    model = nn.Sequential(change(nn.Conv2d(3, 4, 3))).eval()
    with pytest.raises(InputError, match=r"the weight of layer '0' is computed by a hook .* make it a plain parameter"):
        sgfx.freeze(model, IMAGES)


def test_the_example_is_not_worked_on():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    images = IMAGES.clone()
    sgfx.freeze(model, images)
    assert torch.equal(images, IMAGES)


def test_a_module_is_what_its_class_says_and_not_its_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(20, 20), nn.Linear(20, 20)
            self.add, self.relu = nn.Bilinear(20, 20, 20), nn.Sigmoid()

        def forward(self, x):
            return self.relu(self.add(self.one(x), self.other(x)))

    model = Named().eval()
    assert error(sgfx.freeze(model, IMAGES), model, IMAGES) < 1e-5


def test_pictures_without_a_batch_and_pools_with_indices():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            return self.pool(F.max_pool2d(self.conv(x), 2))[0]

    model = Net().eval()
    for images in (IMAGES, IMAGES[0]):
        assert error(sgfx.freeze(model, images), model, images) < 1e-5


def test_a_machine_without_the_kernel_is_told(monkeypatch):
    monkeypatch.setattr("passes.kernel.supported", lambda: "numba can't be imported (no)")
    model = trained(Block())
    with pytest.warns(UserWarning, match=r"freeze uses the library alone: the kernel can't run here: numba"):
        frozen = sgfx.freeze(model, IMAGES)
    assert "numba can't be imported" in frozen.decisions.note
    assert not any(isinstance(module, PackedConv2d) for module in frozen.modules())
    with pytest.raises(InputError, match="strategy='kernel' asks for the kernel, which can't run here: numba"):
        sgfx.freeze(model, IMAGES, strategy="kernel")
