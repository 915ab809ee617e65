"""The networks of the zoo: their sizes against closed forms and published numbers, names, shapes, and tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import models_zoo
from models_zoo.resnet_cifar import OptionAShortcut

PARAMETERS = {
    "lenet5": 61_706,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "densenet121_cifar": 6_956_426,
    "densenet_bc": 769_162,
    "resnet50": 25_557_032,
    "densenet201": 20_013_928,
}
MACS = {  # of convolutions and linear layers, one image
    "lenet5": 6 * 25 * 28**2 + 16 * 150 * 10**2 + 400 * 120 + 120 * 84 + 84 * 10,
    "resnet20": 40_551_040,
    "densenet121_cifar": 888_350_000,
    "resnet50": 4_089_000_000,
    "densenet201": 4_291_000_000,
}
IMAGES = {"lenet5": (1, 32), "resnet50": (3, 224), "densenet201": (3, 224)}


def image(name: str, size: int | None = None) -> Tensor:
    channels, usual = IMAGES.get(name, (3, 32))
    return torch.randn(2, channels, size or usual, size or usual, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_is_counted():
    assert sorted(PARAMETERS) == models_zoo.list()


@pytest.mark.parametrize("name", models_zoo.list())
def test_number_of_parameters(name):
    assert parameters(models_zoo.create(name)) == PARAMETERS[name]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_resnet_parameters_are_those_of_the_closed_form(depth):
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + (16 + 32 * (2 * n - 1)) * 32 + (32 + 64 * (2 * n - 1)) * 64)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert parameters(models_zoo.create(f"resnet{depth}")) == convolutions + norms + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "growth", "classes"), [(10, 4, 10), (40, 12, 100), (100, 12, 10), (22, 5, 3)])
def test_densenet_bc_parameters_are_those_of_the_closed_form(depth, growth, classes):
    layers, channels = (depth - 4) // 6, 2 * growth
    expected = 27 * channels
    for block in range(3):
        for _ in range(layers):
            expected += 2 * channels + channels * 4 * growth + 8 * growth + 9 * 4 * growth * growth
            channels += growth
        if block < 2:
            expected += 2 * channels + channels * (channels // 2)
            channels //= 2
    expected += 2 * channels + channels * classes + classes
    model = models_zoo.create("densenet_bc", depth=depth, growth=growth, num_classes=classes)
    assert parameters(model) == expected


def test_densenet121_cifar_has_the_size_in_the_paper():
    model = models_zoo.create("densenet121_cifar")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    # The paper counts one norm entry pair for each filter, not those of concatenated inputs.
    filters = sum(layer.weight.shape[0] for layer in layers if isinstance(layer, nn.Conv2d))
    counted = sum(layer.weight.numel() for layer in layers) + 2 * filters + 10
    assert counted == pytest.approx(6.893e6, abs=500)


@pytest.mark.parametrize("name", sorted(MACS))
def test_macs(name):
    model = models_zoo.create(name).eval()
    with torch.device("meta"):
        images = torch.empty(1, *image(name, 1).shape[1:2], *image(name).shape[2:])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.to("meta")(images)
    assert counter.get_total_flops() / 2 == pytest.approx(MACS[name], rel=2e-4)


@pytest.mark.parametrize("name", models_zoo.list())
def test_traced_graph_computes_the_same_scores(name):
    torch.manual_seed(0)
    model = models_zoo.create(name).eval()
    images = image(name, 64 if name in ("resnet50", "densenet201") else None)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(fx.symbolic_trace(model)(images), expected)
    assert expected.shape == (2, 1000 if name in ("resnet50", "densenet201") else 10)
    assert expected.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"), [("lenet5", {}), ("resnet20", {}), ("densenet_bc", {"depth": 10}), ("densenet121_cifar", {})]
)
def test_compiles_as_one_graph(name, options):
    model = models_zoo.create(name, **options).eval()
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(image(name))
        torch.testing.assert_close(compiled, model(image(name)))


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "densenet_bc", "densenet121_cifar"])
def test_every_parameter_is_trained(name):
    model = models_zoo.create(name, **({"depth": 10} if name == "densenet_bc" else {}))
    model(image(name)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_option_a_shortcut_by_hand():
    x = torch.arange(18.0).view(1, 2, 3, 3)
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    expected = torch.tensor([[zeros, [[0.0, 2.0], [6.0, 8.0]], [[9.0, 11.0], [15.0, 17.0]], zeros]])
    assert torch.equal(OptionAShortcut(2, 4)(x), expected)


def test_only_blocks_that_widen_have_a_shortcut_of_their_own():
    model = models_zoo.create("resnet32")
    shortcuts = {name for name, module in model.named_modules() if isinstance(module, OptionAShortcut)}
    assert shortcuts == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert [model.get_submodule(f"layer{i}.0.conv1").stride for i in (1, 2, 3)] == [(1, 1), (2, 2), (2, 2)]


def test_module_names_of_resnet():
    names = [
        name for name, module in models_zoo.create("resnet20").named_modules() if list(module.parameters(recurse=False))
    ]
    blocks = [f"layer{i}.{n}" for i in (1, 2, 3) for n in range(3)]
    parts = ("conv1", "bn1", "conv2", "bn2")
    assert names == ["conv1", "bn1", *(f"{block}.{part}" for block in blocks for part in parts), "linear"]


def test_module_names_of_densenet_bc():
    model = models_zoo.create("densenet_bc", depth=16)
    names = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    parts = ("bn1", "conv1", "bn2", "conv2")
    blocks = [[f"block{i}.layer.{n}.{part}" for n in range(2) for part in parts] for i in (1, 2, 3)]
    first, second = (["trans1.bn1", "trans1.conv1"], ["trans2.bn1", "trans2.conv1"])
    assert names == ["conv1", *blocks[0], *first, *blocks[1], *second, *blocks[2], "bn1", "fc"]


def test_densenet121_cifar_differs_from_torchvision_in_stem_and_classes_alone():
    from torchvision.models import densenet121

    ours = {key: value.shape for key, value in models_zoo.create("densenet121_cifar").state_dict().items()}
    theirs = {key: value.shape for key, value in densenet121(weights=None, num_classes=10).state_dict().items()}
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == {"features.conv0.weight"}
    assert ours["features.conv0.weight"] == (64, 3, 3, 3)


def test_densenet121_cifar_keeps_the_resolution_in_its_first_block():
    features = models_zoo.create("densenet121_cifar").eval().features
    assert features.conv0.stride == (1, 1)
    with torch.inference_mode():
        assert features(image("densenet121_cifar")).shape == (2, 1024, 4, 4)
