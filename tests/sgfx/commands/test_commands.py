"""`sgfx train`, `compress` and `evaluate`: what they leave in the folder of a run, and how they go on."""

import builtins
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models_zoo
import sgfx
from sgfx import cli

ROOT = Path(sgfx.__file__).parent.parent
TINY = ["--model", "lenet5", "--model_options", "{in_channels: 3, num_classes: 4}", "--data", "synthetic"]
QUIET = ["--no_progress"]
PRUNED = ["--groups", "2", "--ratio", "0.5"]


def run(*arguments):
    """The exit status of a command that is given to the end."""
    return cli.main([*arguments, *QUIET])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dense():
    """A trained network's folder."""
    assert run("train", *TINY, "--epochs", "1", "--iterations", "3", "--out", "dense") == 0
    return Path("dense")


def test_train_leaves_all_in_its_folder(dense, capsys):
    names = {path.name for path in dense.iterdir()}
    assert names >= {"config.yaml", "log.csv", "global", "final.safetensors", "report.txt", "report.json"}
    state = load_file(dense / "final.safetensors")
    model = models_zoo.create("lenet5", in_channels=3, num_classes=4)
    model.load_state_dict(state)
    assert json.loads((dense / "report.json").read_text())["results"]["trained"]["params"] == sum(
        p.numel() for p in model.parameters()
    )
    assert cli.main(["evaluate", "dense", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    images, targets = _validation()
    with torch.no_grad():
        assert found["top1"] == pytest.approx(float((model.eval()(images).argmax(1) == targets).float().mean()))


def _validation():
    from sgfx.data.sources import open_data

    data = open_data("synthetic")
    return data.normalization(data.val.images), data.val.targets


def test_compress_by_a_recipe_with_steps(dense, capsys):
    command = ["compress", *TINY, *PRUNED, "--checkpoint", "dense/final.safetensors", "--recipe", "cifar-local-global"]
    command += ["--step", "0.25", "--local.iterations", "1", "--epochs", "2", "--out", "small"]
    assert run(*command) == 0
    folder = Path("small")
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [row["phase"] for row in rows] == ["local", "local", "global", "global"]
    report = json.loads((folder / "report.json").read_text())
    assert set(report["results"]) == {"dense", "compressed"}
    small = sgfx.load(
        folder / "final.safetensors", into=models_zoo.create("lenet5", in_channels=3, num_classes=4)
    ).eval()
    images, targets = _validation()
    with torch.no_grad():
        top1 = float((small(images).argmax(1) == targets).float().mean())
    assert report["results"]["compressed"]["top1"] == pytest.approx(top1)
    assert top1 == pytest.approx(float(rows[-1]["val_top1"]))
    assert report["report"]["params"] == sum(p.numel() for p in small.parameters())
    assert "left alone because" in (folder / "report.txt").read_text()
    capsys.readouterr()
    assert run(*command) == 0  # it is finished: the same comes out
    assert f"{100 * top1:.2f}%" in capsys.readouterr().out


def test_compress_without_labels(dense):
    command = ["compress", *TINY, "--groups", "2", "--budget.macs", "0.6", "--calibration", "48"]
    command += ["--distill.steps", "2", "--checkpoint", "dense/final.safetensors", "--out", "small"]
    assert run(*command) == 0
    results = json.loads(Path("small/report.json").read_text())["results"]
    assert results["compressed"]["macs"] / results["dense"]["macs"] == pytest.approx(0.6, abs=0.005)
    start, end = (load_file(f"small/{name}.safetensors") for name in ("compressed", "final"))
    assert start.keys() == end.keys()


def test_a_config_says_the_same_as_flags(dense, capsys):
    command = ["compress", *TINY, *PRUNED, "--checkpoint", "dense/final.safetensors", "--out", "one"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--print_config"])
    Path("config.yaml").write_text(capsys.readouterr().out)
    assert run(*command) == 0
    assert run("compress", "--config", "config.yaml", "--out", "two") == 0
    assert run("compress", "--config", "two/config.yaml", "--out", "three") == 0
    first, second, third = (load_file(f"{name}/final.safetensors") for name in ("one", "two", "three"))
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)
    assert Path("one/config.yaml").read_text() == Path("two/config.yaml").read_text()


def test_a_killed_run_goes_on_to_the_same_weights(dense):
    options = [*TINY, *PRUNED, "--checkpoint", "dense/final.safetensors", "--recipe", "cifar-global", "--epochs", "3"]
    assert run("compress", *options, "--out", "whole") == 0
    command = [sys.executable, "-m", "sgfx", "compress", *options, "--out", "killed", *QUIET]
    alike = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # sums of several threads are other sums
    process = subprocess.Popen(command, env=os.environ | alike, start_new_session=True)
    last = Path("killed/global/last.pt")
    while process.poll() is None and not last.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run("compress", *options, "--out", "killed") == 0
    whole, killed = (load_file(f"{name}/final.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_ctrl_c_says_what_goes_on(dense, monkeypatch, capsys):
    from sgfx.training.recording import Recorder

    after_epoch = Recorder.after_epoch

    def interrupted(self, record):
        after_epoch(self, record)
        raise KeyboardInterrupt

    options = [*TINY, *PRUNED, "--checkpoint", "dense/final.safetensors", "--recipe", "cifar-global", "--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "after_epoch", interrupted)
        assert run("compress", *options, "--out", "small") == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted; the same command goes on from what is in the folder of the run")
    assert said.count("\n") == 1
    assert run("compress", *options, "--out", "small") == 0


def test_pictures_are_drawn_or_one_line_says_why_not(dense, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert (dense / "accuracy_epochs.png").read_bytes().startswith(b"\x89PNG")
    (dense / "accuracy_epochs.png").unlink()
    importing = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run("train", *TINY, "--epochs", "1", "--iterations", "3", "--out", "dense") == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert not (dense / "accuracy_epochs.png").exists()


def test_a_schedule_shrinks_with_the_epochs():
    from sgfx.commands.run import _phase
    from sgfx.training.recipes import recipe

    last = recipe("cifar-global").last  # 200 epochs, divided after 100 and 150
    assert _phase(last, {"epochs": 20}).schedule == (10, 15)
    assert _phase(last, {"epochs": 1}).schedule == ()
    assert _phase(last, {"epochs": 20, "schedule": [5]}).schedule == (5,)
    assert _phase(last, {"lr": 0.5}).schedule == (100, 150)
