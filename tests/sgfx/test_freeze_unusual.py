"""Freezing what is not a plain network of images in single precision: other models, inputs, types and machines."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
import sgfx.freezing
from passes.errors import InputError
from passes.kernel import PackedConv2d
from tests.sgfx.test_freeze import IMAGES, Block, error, needs_kernel, trained


def test_double_precision_is_left_to_the_library():
    model = trained(Block().double())
    assert error(sgfx.freeze(model, IMAGES.double()), model, IMAGES.double()) < 1e-12


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


def test_layers_with_code_of_their_own_outside_every_region_are_run_as_they_are():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x) + 1

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.own = nn.Conv2d(8, 8, 1), Doubling(8, 8, 1)

        def forward(self, images):
            return torch.cat([self.own(self.conv(image[None])) for image in images])

    torch.manual_seed(0)
    images = torch.rand(3, 8, 5, 5)
    small = sgfx.compile(Loop().eval(), groups=2, ratio=0.5, overrides={"conv": {}}, example_inputs=images)
    assert sgfx.plans(small)["own"].grouped
    frozen = sgfx.freeze(small, images)
    assert error(frozen, small, images) < 1e-5
    assert list(frozen.decisions.layers) == ["conv"]
    assert "which is run as it is" in frozen.decisions.unfused["own"]


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
