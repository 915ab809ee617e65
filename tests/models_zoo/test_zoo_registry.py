"""Names and options of the zoo: what is listed, what is refused and in which words, and what importing costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models_zoo
from models_zoo import registry

ROOT = Path(__file__).parents[2]
CIFAR = ("densenet121_cifar", "densenet_bc", "lenet5", "resnet110", "resnet20", "resnet32", "resnet44", "resnet56")
SMALL = {"densenet_bc": {"depth": 10}}


def test_list_is_sorted_complete_and_a_fresh_list():
    names = models_zoo.list()
    assert names == sorted([*CIFAR, "resnet50", "densenet201"])
    names.clear()
    assert len(models_zoo.list()) == 10


def test_signatures_are_those_of_the_api():
    assert list(inspect.signature(models_zoo.list).parameters) == []
    assert list(inspect.signature(models_zoo.create).parameters) == ["name", "options"]
    assert list(inspect.signature(models_zoo.load_checkpoint).parameters) == ["model", "path"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("ResNet20", "resnet20"), ("resnet-56", "resnet56"), ("lenet", "lenet5"), ("densenet", "densenet201")],
)
def test_unknown_name_says_what_is_near_and_what_there_is(given, meant):
    with pytest.raises(
        ValueError, match=rf"no model named '{given}'; did you mean .*{meant}.*\? The zoo has: densenet121"
    ) as raised:
        models_zoo.create(given)
    assert all(name in str(raised.value) for name in models_zoo.list())


@pytest.mark.parametrize("given", ["", "vgg16", 7, None])
def test_unknown_name_with_nothing_near_lists_the_zoo(given):
    with pytest.raises(ValueError, match=rf"no model named {given!r}\. The zoo has: densenet121_cifar, densenet201, "):
        models_zoo.create(given)


@pytest.mark.parametrize("name", CIFAR)
def test_unknown_option_names_it_and_the_accepted_ones(name):
    accepted = "depth, growth, in_channels, num_classes" if name == "densenet_bc" else "in_channels, num_classes"
    with pytest.raises(ValueError, match=rf"^{name} has no option 'classes'; it accepts: {accepted}$"):
        models_zoo.create(name, classes=10)


def test_several_unknown_options_are_all_named():
    with pytest.raises(ValueError, match=r"^resnet20 has no options 'depth', 'width'; it accepts: "):
        models_zoo.create("resnet20", depth=20, width=2)


@pytest.mark.parametrize(
    ("name", "option", "accepted"),
    [
        (
            "resnet50",
            "in_channels",
            "groups, norm_layer, num_classes, replace_stride_with_dilation, width_per_group, zero",
        ),
        ("resnet50", "layers", "groups, norm_layer, num_classes"),
        ("resnet50", "pretrained", "groups, norm_layer, num_classes"),
        ("densenet201", "growth_rate", "bn_size, drop_rate, memory_efficient, num_classes"),
        ("densenet201", "pretrained", "bn_size, drop_rate, memory_efficient, num_classes"),
    ],
)
def test_unknown_option_of_a_torchvision_model(name, option, accepted):
    with pytest.raises(ValueError, match=rf"^{name} has no option '{option}'; it accepts: {accepted}"):
        models_zoo.create(name, **{option: True})


@pytest.mark.parametrize("name", ["resnet50", "densenet201"])
def test_weights_are_never_downloaded(name, monkeypatch):
    def download(*_args, **_kwargs):
        pytest.fail("tried to download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    with pytest.raises(
        ValueError, match=rf"weights='DEFAULT': nothing is downloaded\. Create {name} without.*load_checkpoint"
    ):
        models_zoo.create(name, weights="DEFAULT")


def test_torchvision_models_take_its_options():
    model = models_zoo.create("resnet50", weights=None, num_classes=7, groups=2)
    assert model.fc.out_features == 7
    assert model.layer1[0].conv2.groups == 2
    model = models_zoo.create("densenet201", num_classes=3, drop_rate=0.5)
    assert model.classifier.out_features == 3
    assert model.features.denseblock1.denselayer1.drop_rate == 0.5


@pytest.mark.parametrize("value", [0, -1, 2.0, "10", None, True])
@pytest.mark.parametrize("name", models_zoo.list())
def test_num_classes_must_be_a_count(name, value):
    with pytest.raises(ValueError, match=rf"^num_classes must be a whole number of at least 1, given {value!r}$"):
        models_zoo.create(name, num_classes=value)


@pytest.mark.parametrize("name", CIFAR)
def test_in_channels_must_be_a_count(name):
    with pytest.raises(ValueError, match=r"^in_channels must be a whole number of at least 1, given 0$"):
        models_zoo.create(name, in_channels=0)


@pytest.mark.parametrize("option", ["growth", "depth"])
def test_densenet_bc_options_must_be_counts(option):
    with pytest.raises(ValueError, match=rf"^{option} must be a whole number of at least 1, given 1\.5$"):
        models_zoo.create("densenet_bc", **{option: 1.5})


@pytest.mark.parametrize(
    ("depth", "nearest"), [(99, "94 or 100"), (101, "100 or 106"), (11, "10 or 16"), (4, "10"), (9, "10")]
)
def test_densenet_bc_depth_must_be_one_of_a_network(depth, nearest):
    with pytest.raises(ValueError, match=rf"depth must be 6·n \+ 4 .* given {depth}; the nearest is {nearest}$"):
        models_zoo.create("densenet_bc", depth=depth)


@pytest.mark.parametrize("name", CIFAR)
def test_channels_and_classes_reach_the_network(name):
    model = models_zoo.create(name, num_classes=4, in_channels=2, **SMALL.get(name, {})).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 2, 32, 32)).shape == (2, 4)


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @registry.register("mine")
    def build(width: int = 2) -> nn.Module:
        return nn.Linear(width, 1)

    assert models_zoo.create("mine", width=3).in_features == 3
    with pytest.raises(ValueError, match="already has a model named 'mine'; register the new one under another name"):
        registry.register("mine")(build)


def test_importing_is_light():
    code = "import sys, models_zoo; models_zoo.create('lenet5'); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
