"""Recipes: the paper's numbers, what a run comes to by hand, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import models_zoo
import sgfx
from passes.errors import InputError
from sgfx.training.recipes import Phase
from tests.sgfx.test_training import same_weights

IMAGES = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LOCAL = Phase(epochs=1, lr=0.01)
LAST = Phase(epochs=2, lr=0.05, schedule=(1,), options={"progress": False})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 4)),
    )


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, torch.arange(32) % 4), 8, shuffle=True)


def short(name: str, **changes):
    recipe = sgfx.recipe(name)
    local = None if recipe.local is None else LOCAL
    return replace(recipe, **{"step": recipe.step and 0.3, "local": local, "last": LAST, "groups": 2, **changes})


def run(name: str, model=None, changes=None, **options):
    given = {"ratio": 0.5} if "budget" not in options and "baseline" not in name else {}
    made = short(name, **(changes or {}))
    return made.run(model or network(), loader(), loader(), progress=False, **given, **options)


def fit(model, phase, seed=0, **options):
    given = {"progress": False, "seed": seed, **phase.arguments(), **options}
    return sgfx.Trainer(model, loader(), loader(), **given).fit()


# Numbers


@pytest.mark.parametrize(
    ("name", "batch", "step", "local", "last"),
    [
        ("cifar-baseline", 64, None, None, (200, 0.1, (100, 150))),
        ("cifar-local-global", 64, 0.05, (4, 0.001, "constant"), (200, 0.01, (100, 150))),
        ("cifar-global", 64, None, None, (200, 0.01, (100, 150))),
        ("imagenet-local-global", 128, 0.1, (20, 0.0001, "constant"), (90, 0.01, (30, 60))),
        ("imagenet-global", 128, None, None, (90, 0.01, (30, 60))),
    ],
)
def test_the_papers_schedules(name, batch, step, local, last):
    recipe = sgfx.recipe(name)
    assert (recipe.batch_size, recipe.step) == (batch, step)
    for phase, numbers in ((recipe.local, local), (recipe.last, last)):
        assert (phase is None) == (numbers is None)
        if phase is not None:
            assert (phase.epochs, phase.lr, phase.schedule) == numbers
            assert (phase.weight_decay, phase.momentum) == (1e-4, 0.9)


# Runs


def test_global_is_compile_and_a_trainer():
    dense = network()
    before = copy.deepcopy(dense)
    outcome = run("cifar-global", dense)
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    history = fit(small, LAST)
    assert same_weights(outcome.model, small)
    assert (outcome.history, outcome.steps) == (history, ())
    assert same_weights(dense, before)


def test_local_and_global_is_a_pruner_and_a_trainer_after_each_step():
    outcome = run("cifar-local-global", teacher=network())
    pruner = sgfx.Pruner(network(), groups=2, ratio=0.5, step=0.3)
    steps = tuple((step, fit(pruner.model, LOCAL, step.index, teacher=network())) for step in pruner)
    small = pruner.lower()
    history = fit(small, LAST, teacher=network())
    assert same_weights(outcome.model, small)
    assert (outcome.steps, outcome.history) == (steps, history)
    assert [step.requested_ratio for step, _ in steps] == [0.3, 0.5]


def test_local_training_in_iterations():
    phase = Phase(epochs=None, lr=0.01, iterations=6)  # of batches, four of which are an epoch
    outcome = run("cifar-local-global", changes={"local": phase})
    assert [[record.epoch for record in history.epochs] for _, history in outcome.steps] == [[1, 2]] * 2


def test_calibration_and_a_budget_in_front():
    options = {"budget": {"macs": 0.6}, "calibration": IMAGES}
    outcome = run("cifar-global", **options)
    small = sgfx.compile(network(), groups=2, **options)
    fit(small, LAST)
    assert same_weights(outcome.model, small)


def test_a_budget_in_steps_comes_to_the_same_ratios():
    options = {"budget": {"macs": 0.6}, "calibration": IMAGES}
    outcome = run("cifar-local-global", **options)
    expected = {
        path: plan.requested_ratio for path, plan in sgfx.plans(sgfx.compile(network(), groups=2, **options)).items()
    }
    assert {path: plan.requested_ratio for path, plan in sgfx.plans(outcome.model).items()} == expected
    assert len(set(expected.values())) > 2


def test_calibration_after_the_last_step():
    still = {"local": Phase(epochs=1, lr=1e-30, weight_decay=0.0), "last": replace(LAST, lr=1e-30, weight_decay=0.0)}
    model = network()
    model[1] = model[4] = nn.Identity()  # norms would move, whatever the rate is
    outcome = run("cifar-local-global", model, changes=still, calibration=IMAGES)
    stepwise = sgfx.compile(model, groups=2, ratio=0.5, step=0.3, calibration=IMAGES)
    for name, weight in stepwise.named_parameters():
        torch.testing.assert_close(outcome.model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


def test_elimination():
    options = {"overrides": {"3": {"ratio": 0.9}}, "example_inputs": IMAGES[:1]}
    small, smaller = (run("cifar-local-global", eliminate=eliminate, **options).model for eliminate in (False, True))
    assert len(smaller[0].weight) < len(small[0].weight) == 8


def test_averages_are_what_is_made():
    with_averages = replace(LAST, options={"ema": 0.5})
    outcome = run("cifar-global", changes={"last": with_averages})
    small = sgfx.compile(network(), groups=2, ratio=0.5)
    trainer = sgfx.Trainer(small, loader(), loader(), progress=False, **with_averages.arguments())
    trainer.fit()
    assert same_weights(outcome.model, trainer.averaged)
    assert not same_weights(outcome.model, small)


def test_a_baseline_trains_the_model_itself(tmp_path):
    model, twin = network(), network()
    outcome = run("cifar-baseline", model, folder=tmp_path)
    assert outcome.model is model
    fit(twin, LAST)
    assert same_weights(model, twin)
    assert same_weights(models_zoo.load_checkpoint(network(), tmp_path / "final.safetensors"), twin)


def test_the_folder(tmp_path):
    outcome = run("cifar-local-global", folder=tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.*")) == [
        *(
            "compressed.safetensors",
            "final.safetensors",
            "generators.pt",
            "global/best.pt",
            "global/last.pt",
            "global/log.csv",
        ),
        *("local-01/best.pt", "local-01/log.csv", "local-02/best.pt", "local-02/log.csv", "log.csv", "pruner.pt"),
        "recipe.json",
    ]
    assert same_weights(sgfx.load(tmp_path / "final.safetensors", into=network()), outcome.model)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "phase,step,pruned,epoch,lr,loss,train_top1,val_top1"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["local", "1"],
        ["local", "2"],
        ["global", ""],
        ["global", ""],
    ]
    about = json.loads((tmp_path / "recipe.json").read_text())
    assert about["compression"] == {"groups": 2, "ratio": 0.5}
    again = run("cifar-local-global", folder=tmp_path, resume=True)
    assert (again.steps, again.history) == (outcome.steps, outcome.history)
    assert same_weights(again.model, outcome.model)


# Refusals


def test_an_unknown_recipe():
    with pytest.raises(
        InputError, match=r"unknown recipe 'cifar-globl'; did you mean 'cifar-global'.*There are cifar-base"
    ):
        sgfx.recipe("cifar-globl")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cifar-global",
            {"budget": {"macs": 0.5}, "ratio": 0.5},
            "'cifar-global' compresses: give exactly one of ratio",
        ),
        ("cifar-local-global", {"budget": None}, "compresses: give exactly one of ratio and budget"),
        ("cifar-local-global", {"budget": {"macs": 0.5}}, "budget measures on data .* give calibration too"),
        ("cifar-global", {"step": 0.1}, "step is decided by the recipe: leave it out, or change the recipe"),
        ("cifar-local-global", {"inplace": True}, "inplace is decided by the recipe"),
        ("cifar-baseline", {"ratio": 0.5}, "'cifar-baseline' compresses nothing: leave out ratio"),
        ("cifar-global", {"resume": True}, "resume goes on with what is in a folder: give it too"),
    ],
)
def test_options_that_do_not_suit(name, options, message):
    with pytest.raises(InputError, match=message):
        run(name, **options)


def test_recipes_that_make_no_sense():
    with pytest.raises(InputError, match="a phase needs epochs or iterations: both are None"):
        Phase(epochs=None, lr=0.1)
    with pytest.raises(InputError, match=r"recipe 'cifar-global' has step=0.1 and local=None: give both or none"):
        replace(sgfx.recipe("cifar-global"), step=0.1)


def test_a_folder_of_another_run(tmp_path):
    run("cifar-global", folder=tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.glob("**/*.*")}
    with pytest.raises(InputError, match="holds a run already: go on with resume=True"):
        run("cifar-global", folder=tmp_path)
    with pytest.raises(
        InputError, match=r'another recipe or of other options: "groups": 4 is not what recipe.json says'
    ):
        run("cifar-global", folder=tmp_path, resume=True, groups=4)
    with pytest.raises(InputError, match='"name": "cifar-local-global"'):
        run("cifar-local-global", folder=tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*.*")} == kept
