"""The shipped configs, on a miniature of ImageNet: its layout, a hundred images of a few classes, random weights."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import models_zoo
import sgfx
from sgfx import cli
from sgfx.commands.options import CompressOptions
from sgfx.commands.parsing import parse
from sgfx.published import TABLES

CONFIGS = sorted((Path(sgfx.__file__).parent.parent / "examples" / "configs").glob("imagenet-*.yaml"))
SCHEMES = {"ResNet-G": "global", "DenseNet-G": "global", "ResNet-LG": "local-global", "DenseNet-LG": "local-global"}
ROWS = {
    (
        table.model,
        row[1],
        row[2],
        {"G": "imagenet-global", "LG": "imagenet-local-global"}[row[0].split()[0].split("-")[1]],
    )
    for table in TABLES
    if table.number in (3, 4)
    for row in table.rows
    if row[1]
}


def options(path):
    given = ["--config", str(path), "--data", "digits", "--out", "run"]
    return parse(CompressOptions, given, prog="sgfx compress", description="")


def test_there_is_a_config_for_every_row_of_tables_3_and_4():
    found = [options(path) for path in CONFIGS]
    rows = [(each.model, each.ratio, each.linear_ratio, each.recipe) for each in found if each.recipe]
    assert sorted(rows) == sorted(ROWS)
    for each in found:
        assert each.groups == 16
        assert each.ignore == (["*.downsample"] if each.model == "resnet50" and each.recipe else [])
    unlabelled = [each for each in found if each.recipe is None]
    assert sorted(each.budget.macs for each in unlabelled) == [0.36, 0.5, 0.58]
    assert all((each.calibration, each.distill.steps > 0) == (2600, True) for each in unlabelled)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A hundred images in ImageNet's layout, some not square, one grey, one damaged; and a model for them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, count in (("train", 15), ("val", 10)):
        for kind in ("n01440764", "n02102040", "n02979186", "n03000684"):
            folder = tmp_path / "imagenet" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(256, size=(70 + number, 90, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert("L" if number == 3 else "RGB")
                image.save(folder / f"{kind}_{number}.JPEG")
    damaged = tmp_path / "imagenet/train/n02102040/n02102040_5.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:100])
    Path("small.py").write_text(
        "from torchvision.models.resnet import BasicBlock, ResNet\n"
        "from torch import nn\n"
        "def make(): return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)\n"
        "def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    return ["--model", "small:make", "--data", "imagenet", "--image_size", "32", "--workers", "0", "--no_progress"]


@pytest.mark.parametrize("name", ["imagenet-resnet50-global-08", "imagenet-resnet50-local-global-06"])
def test_rows_of_table_3_on_the_miniature(imagenet, name, capsys):
    config = next(str(path) for path in CONFIGS if path.stem == name)
    short = ["--epochs", "1", "--iterations", "1", "--batch_size", "16"]
    if "local" in name:
        short += ["--step", "0.3", "--local.iterations", "1"]
    assert cli.main(["compress", "--config", config, *imagenet, *short, "--out", "run"]) == 0
    said = capsys.readouterr()
    assert "dense" in said.out
    small = _opened()
    pruned = {path: plan for path, plan in sgfx.plans(small).items() if plan.grouped}
    ratio = 0.8 if "08" in name else 0.6
    assert pruned["layer1.0.conv1"].achieved_ratio == pytest.approx(ratio, abs=0.02)
    assert pruned["fc"].requested_ratio == 0.6
    assert "layer2.0.downsample.0" not in pruned
    assert "conv1" not in pruned


def _opened():
    from sgfx.commands.models import make_model

    return sgfx.load("run/final.safetensors", into=make_model("small:make", {}))


def test_the_unlabelled_protocol_on_the_miniature(imagenet, capsys):
    config = next(str(path) for path in CONFIGS if path.stem.endswith("unlabelled-50"))
    less = ["--model", "small:tiny", "--calibration", "60", "--distill.steps", "2"]
    assert cli.main(["compress", "--config", config, *imagenet, *less, "--out", "run"]) == 0
    said = capsys.readouterr()
    assert "1 of 60 images of" in said.err
    assert "n02102040_5.JPEG" in said.err
    assert "compressed" in said.out
    assert cli.main(["evaluate", "run", "--workers", "0"]) == 0


def test_the_zoo_has_the_models_of_the_configs():
    assert {options(path).model for path in CONFIGS} <= set(models_zoo.list())
