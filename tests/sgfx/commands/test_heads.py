"""New heads: which layer they replace, and models that are compressed before or after they learn other classes."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import models_zoo
import sgfx
from sgfx import cli
from sgfx.commands.heads import replace_head
from sgfx.commands.models import check_takes

SEVEN = ["--model", "lenet5", "--model_options", "{in_channels: 3, num_classes: 7}", "--data", "synthetic"]
SHORT = ["--epochs", "1", "--iterations", "3", "--no_progress"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint():
    """Weights of a network of seven classes; the data have four."""
    torch.manual_seed(0)
    torch.save(lenet(7).state_dict(), "seven.pt")
    return "seven.pt"


def lenet(classes):
    return models_zoo.create("lenet5", in_channels=3, num_classes=classes)


@pytest.mark.parametrize(
    ("model", "head", "width"),
    [
        (torchvision.models.resnet18(), "fc", 512),
        (torchvision.models.mobilenet_v2(), "classifier.1", 1280),
        (torchvision.models.vit_b_16(image_size=32), "heads.head", 768),
    ],
)
def test_the_head_is_the_last_linear_layer_that_gives_the_scores(model, head, width):
    mode = model.training
    before = {name: x.clone() for name, x in model.state_dict().items()}
    replace_head(model, torch.randn(2, 3, 32, 32), 5)
    new = model.get_submodule(head)
    assert (type(new), new.in_features, new.out_features) == (nn.Linear, width, 5)
    assert model.training == mode
    after = model.state_dict()
    assert all(torch.equal(x, before[name]) for name, x in after.items() if not name.startswith(head))
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_modules_keep_their_modes():
    model = torchvision.models.resnet18()
    model.bn1.eval()  # frozen, as a user's function may make it
    check_takes(model, torch.randn(2, 3, 32, 32), "resnet18")
    replace_head(model, torch.randn(2, 3, 32, 32), 5)
    assert (model.training, model.bn1.training, model.layer1.training) == (True, False, True)


def test_a_regrouped_head_is_replaced_by_a_dense_one():
    x = torch.randn(2, 3, 32, 32)
    small = sgfx.compile(torchvision.models.resnet18(), groups=4, ratio=0.5, linear_ratio=0.5)
    assert "fc" in {path for path, plan in sgfx.plans(small).items() if plan.grouped}
    replace_head(small, x, 5)
    assert "fc" not in sgfx.plans(small)
    sgfx.save(small, "small.safetensors")
    again = sgfx.load("small.safetensors", into=torchvision.models.resnet18(num_classes=5))
    assert torch.equal(again.eval()(x), small.eval()(x))


def test_a_head_that_several_names_share_is_replaced_under_all():
    holder = Shared()
    replace_head(holder, torch.randn(2, 4), 5)
    assert holder.one is holder.other
    assert holder.one.out_features == 5


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3)
        self.other = self.one

    def forward(self, x):
        return self.other(x)


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        (torchvision.models.squeezenet1_1, 5, "SqueezeNet has no linear layer that gives its scores"),
        (lambda: lenet(7), 1, "at least 2, not 1"),
    ],
)
def test_what_can_not_have_a_new_head_keeps_its_own(model, classes, message):
    model = model()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        replace_head(model, torch.randn(2, 3, 32, 32), classes)
    assert list(model.state_dict()) == before


def test_transferred_then_compressed(checkpoint, capsys):
    command = ["compress", *SEVEN, *SHORT, "--checkpoint", checkpoint, "--head", "4", "--groups", "2", "--ratio", "0.5"]
    assert cli.main([*command, "--recipe", "cifar-global", "--out", "small"]) == 0
    small = sgfx.load("small/final.safetensors", into=lenet(4))
    assert any(plan.grouped for plan in sgfx.plans(small).values())
    capsys.readouterr()
    assert cli.main(["evaluate", "small"]) == 0
    assert "small" in capsys.readouterr().out


def test_compressed_then_transferred(checkpoint, capsys):
    small = sgfx.compile(models_zoo.load_checkpoint(lenet(7), checkpoint), groups=2, ratio=0.5)
    sgfx.save(small, "compressed.safetensors")
    command = ["train", *SEVEN, *SHORT, "--checkpoint", "compressed.safetensors", "--head", "4", "--out", "birds"]
    assert cli.main(command) == 0
    birds = sgfx.load("birds/final.safetensors", into=lenet(4))
    assert sgfx.plans(birds)["conv2"].keep.equal(sgfx.plans(small)["conv2"].keep)
    assert not torch.equal(birds.conv2.weight, small.conv2.weight)
    capsys.readouterr()
    assert cli.main(["evaluate", "birds"]) == 0
    assert "birds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "4", "--checkpoint", "seven.pt"], "--head puts random weights on the model"),
        (["--head", "9", "--recipe", "cifar-global"], "scores for 9 classes, and the data have 4"),
        (["--recipe", "cifar-global"], "put a new head on it (--head 4)"),
        (["--head", "4", "--recipe", "cifar-global", "--checkpoint", "made.safetensors"], "is compressed already"),
    ],
)
def test_wrong_heads(checkpoint, capsys, flags, message):
    sgfx.save(sgfx.compile(lenet(7), groups=2, ratio=0.5), "made.safetensors")
    assert cli.main(["compress", *SEVEN, *flags, "--ratio", "0.5", "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
