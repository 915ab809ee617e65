"""`--task detection`: train, compress and evaluate a detector on a folder in COCO's format."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sgfx
from sgfx import cli
from sgfx.commands.models import make_model
from sgfx.commands.parsing import read_config, write_config
from sgfx.data.detection import DetectionLoaders, open_detection
from tests.tools.detection import measured, tiny_detector, write_coco

MODEL = ["--model", "tests.tools.detection:tiny_detector"]
TINY = ["--task", "detection", *MODEL, "--data", "data", "--workers", "0", "--batch_size", "2"]
QUIET = ["--no_progress"]


def run(*arguments):
    """The exit status of a command that is given to the end."""
    return cli.main([*arguments, *QUIET])


@pytest.fixture(autouse=True)
def _in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_coco(Path("data"), {"train": 6, "val": 3})


@pytest.fixture
def dense():
    """A trained detector's folder."""
    assert run("train", *TINY, "--epochs", "2", "--iterations", "5", "--lr", "0.02", "--out", "dense") == 0
    return Path("dense/final.safetensors")


def test_a_detector_is_trained_and_evaluated(dense, capsys):
    rows = list(csv.DictReader(Path("dense/log.csv").read_text().splitlines()))
    assert len(rows) == 2
    assert {"loss", "loss_classifier", "loss_rpn_box_reg", "val_map", "val_map50", "val_map75"} <= rows[0].keys()
    capsys.readouterr()
    assert cli.main(["evaluate", "dense", "--json", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny_detector()
    model.load_state_dict(load_file(dense))
    wanted = measured(model, DetectionLoaders(open_detection("data")).val)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert {"AP kind1", "AP kind2"} <= found.keys()
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert json.loads(Path("dense/report.json").read_text())["results"]["trained"]["map"] == pytest.approx(
        wanted["map"]
    )
    assert run("train", *TINY, "--epochs", "2", "--iterations", "5", "--lr", "0.02", "--out", "dense") == 0


@pytest.mark.filterwarnings("ignore")  # nothing was learnt that could be kept
def test_it_is_compressed_without_labels_and_with_them(dense):
    options = ["--checkpoint", str(dense), "--groups", "4", "--ratio", "0.5", "--linear_ratio", "0.25"]
    options += ["--ignore", "[roi_heads.box_head]"]
    free = ["--calibration", "4", "--distill.steps", "2"]
    assert run("compress", *TINY, *options, *free, "--out", "free") == 0
    assert run("compress", *TINY, *options, "--recipe", "detection-global", "--epochs", "1", "--out", "fine") == 0
    for name in ("free", "fine"):
        small = sgfx.load(f"{name}/final.safetensors", into=tiny_detector())
        plans = sgfx.plans(small)
        assert plans["backbone.fpn.layer_blocks.0.0"].requested_ratio == 0.5
        assert plans["roi_heads.box_predictor.bbox_pred"].requested_ratio == 0.25  # a run has shown how it is used
        report = json.loads(Path(f"{name}/report.json").read_text())
        assert report["results"].keys() == {"dense", "compressed"}
        assert report["report"]["params"] == sum(p.numel() for p in small.parameters())
    assert len(list(csv.DictReader(Path("fine/log.csv").read_text().splitlines()))) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mixup", "0.2"], "--mixup is of --task classification"),
        (["--image_size", "64"], "--image_size is of --task classification: give --model_options.min_size"),
        (["--head", "3"], "--head is of --task classification"),
        (["--model", "resnet20"], "needs a detector as torchvision has them, and resnet20 is a ResNetCifar"),
        (["--model_options.num_classes", "5"], "knows labels up to 4, and the data have 2 classes: .*num_classes 3"),
        (["--data", "nothing"], "data: nothing does not exist"),
        (["--recipe", "detection-global"], "compresses: it is for sgfx compress"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message, capsys):
    assert run("train", *TINY, *given, "--out", "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert not Path("out").exists()


def test_a_run_from_before_there_were_tasks_goes_on():
    options = ["train", "--model", "lenet5", "--model_options", "{in_channels: 3, num_classes: 4}"]
    options += ["--data", "synthetic", "--iterations", "1", "--epochs", "1", "--out", "old"]
    assert run(*options) == 0
    config = Path("old/config.yaml")
    values = read_config(config)
    del values["task"]
    config.write_text(write_config(values))
    assert run(*options) == 0


def test_torchvisions_detectors_download_nothing(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    made = make_model("ssdlite320_mobilenet_v3_large", {"num_classes": 3})
    assert sum(p.numel() for p in made.parameters()) > 1e6
