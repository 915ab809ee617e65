"""What is given wrongly is said in one line, with exit status 2, and nothing is lost."""

from pathlib import Path

import pytest

from sgfx import cli

TINY = ["--model", "lenet5", "--model_options", "{in_channels: 3, num_classes: 4}", "--data", "synthetic"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(capsys, *arguments):
    """The one line on stderr of a command that must end with 2."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("sgfx")
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rato", "0.5"], "there is no option '--rato'; did you mean ratio?"),
        (["--budget.mac", "0.5"], "there is no option '--budget.mac'; did you mean budget.macs"),
        (["--macs", "0.5"], "did you mean budget.macs?"),
        (["--zzzzzz=1"], "there is no option '--zzzzzz'; see sgfx compress --help"),
        (["--ratio", "half"], "--ratio is to be number, not 'half'"),
        (["--groups", "2.5"], "--groups is to be whole number, not"),
        (["--criterion", "l3"], "--criterion"),
        ([], "give exactly one of --ratio, --budget.macs and --budget.params"),
        (["--ratio", "0.5", "--budget.macs", "0.5"], "give exactly one of"),
        (["--budget.macs", "0.5"], "give --calibration 512, say"),
        (["--ratio", "0.5", "--distill.steps", "3"], "--distill.steps trains on the --calibration images alone"),
        (["--ratio", "0.5", "--teacher"], "--teacher is of training by a recipe"),
        (["--ratio", "1.5"], "ratio"),
        (["--ratio", "0.5", "--recipe", "cifar-globl"], "unknown recipe 'cifar-globl'; did you mean 'cifar-global'"),
        (["--ratio", "0.5", "--calibration", "999"], "has 192 training images: 999 can't be taken"),
        (["--ratio", "0.5", "--normalization", "imagnet"], "unknown normalization 'imagnet'"),
        (["--ratio", "0.5", "--checkpoint", "none.pt"], "none.pt does not exist"),
        (["--ratio", "0.5", "--data", "nowhere"], "nowhere does not exist"),
        (["--ratio", "0.5", "--data", "digits"], "lenet5 has scores for 4 classes, and the data have 10"),
        (["--ratio", "0.5", "--image_size", "16"], "lenet5 does not take images [2, 3, 16, 16]"),
        (["--ratio", "0.5", "--model", "resnet21"], "have no model 'resnet21'; did you mean resnet"),
        (["--ratio", "0.5", "--model", "nowhere:make"], "can't import nowhere"),
        (["--ratio", "0.5", "--model", "torch.nn:make"], "torch.nn has no function 'make'"),
        (
            ["--ratio", "0.5", "--model", "builtins:dict"],
            "it must give a torch.nn.Module",
        ),
        (["--ratio", "0.5", "--model_options", "{classes: 3}"], "lenet5 has no option 'classes'"),
        (["--ratio", "0.5", "--model", "resnet18", "--model_options", "{classes: 3}"], "can't be made with"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_wrong_options_of_compress(flags, message, capsys):
    assert message in said(capsys, "compress", *TINY, "--out", "run", *flags)
    assert not Path("run/final.safetensors").exists()


def test_required_options_are_named(capsys):
    assert "error: --data, --out must be given" in said(capsys, "train", "--model", "lenet5")
    assert "error: RUN must be given" in said(capsys, "evaluate")


def test_commands_that_there_are_not(capsys):
    assert "invalid choice: 'trian'" in said(capsys, "trian")
    assert "COMMAND" in said(capsys)


def test_unknown_keys_of_a_config_are_named(capsys):
    Path("c.yaml").write_text("modle: lenet5\n")
    assert "there is no option 'modle'; did you mean model" in said(capsys, "train", "--config", "c.yaml")
    Path("c.yaml").write_text("budget:\n  mac: 0.5\n")
    assert "there is no option 'budget.mac'; did you mean budget.macs" in said(capsys, "compress", "--config", "c.yaml")
    Path("c.yaml").write_text("model: [\n")
    assert "Problems parsing config" in said(capsys, "train", "--config", "c.yaml")


def test_recipes_that_compress_are_not_for_train(capsys):
    assert "recipe 'cifar-global' compresses" in said(
        capsys, "train", *TINY, "--recipe", "cifar-global", "--out", "run"
    )


def test_a_checkpoint_of_another_model(capsys):
    import torch

    torch.save({"conv.weight": torch.zeros(3)}, "other.pt")
    line = said(capsys, "compress", *TINY, "--ratio", "0.5", "--checkpoint", "other.pt", "--out", "run")
    assert "other.pt is not of this model" in line
    assert not Path("run").exists()


def test_a_folder_of_other_options_is_refused_with_what_differs(capsys):
    command = ["compress", *TINY, "--no_progress", "--out", "run"]
    assert cli.main([*command, "--ratio", "0.5"]) == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    line = said(capsys, *command, "--ratio", "0.25", "--eliminate")
    assert "holds a run with other options (ratio was 0.5, and is 0.25; eliminate was False, and is True)" in line
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_folder_of_something_else_is_refused(capsys):
    Path("run").mkdir()
    Path("run/thesis.tex").touch()
    assert "is no run of this command, and is not empty" in said(
        capsys, "compress", *TINY, "--ratio", "0.5", "--out", "run"
    )
    assert "out: run/thesis.tex is a file" in said(
        capsys, "compress", *TINY, "--ratio", "0.5", "--out", "run/thesis.tex"
    )
    assert "run is no run (there is no config.yaml)" in said(capsys, "evaluate", "run")
    Path("run/config.yaml").touch()
    assert "not finished" in said(capsys, "evaluate", "run")


def test_functions_of_the_working_folder_make_models():
    Path("mine.py").write_text(
        "import models_zoo\ndef make(width): return models_zoo.create('lenet5', in_channels=3, num_classes=width)\n"
    )
    options = ["--model", "mine:make", "--model_options.width", "4", "--data", "synthetic", "--ratio", "0.5"]
    assert cli.main(["compress", *options, "--no_progress", "--out", "run"]) == 0
    assert cli.main(["evaluate", "run"]) == 0


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet10t"])
def test_models_of_torchvision_and_timm(name):
    from sgfx.commands.models import make_model

    if name == "resnet10t":
        pytest.importorskip("timm")
    assert make_model(name, {"num_classes": 3}).training
