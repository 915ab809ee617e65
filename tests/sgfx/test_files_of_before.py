"""Files that the first state of version 0.1.0 wrote, one of each kind: they still open, and give what they gave then.

``tests/data/before`` was written before structures left the buffers and modules moved into folders; its ``outputs.pth``
holds an input and what each model gave for it.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import sgfx

BEFORE = Path(__file__).parents[1] / "data" / "before"
OUTPUTS = torch.load(BEFORE / "outputs.pth", weights_only=True)


def network():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()


def dense():
    model = network()
    model.load_state_dict(torch.load(BEFORE / "dense.pth", weights_only=True))
    return model


def check_outputs(model, name):
    with torch.no_grad():
        torch.testing.assert_close(model(OUTPUTS["x"]), OUTPUTS[name], rtol=1e-5, atol=1e-6)


def test_the_dense_model_is_the_one_of_then():
    check_outputs(dense(), "dense")


@pytest.mark.parametrize("name", ["compiled", "eliminated", "with_decisions"])
def test_saved_models_load(name):
    model = sgfx.load(BEFORE / f"{name}.safetensors", into=network())
    check_outputs(model, name)
    assert any(plan.grouped for plan in sgfx.plans(model).values())


def test_a_state_dict_of_a_compiled_model_opens():
    check_outputs(sgfx.load(BEFORE / "compiled.pth", into=network()), "compiled")


def test_decisions_of_then_are_read_and_freezing_still_works():
    model = sgfx.load(BEFORE / "with_decisions.safetensors", into=network())
    frozen = sgfx.freeze(model, OUTPUTS["x"], progress=False)
    check_outputs(frozen, "with_decisions")


def test_a_pruner_goes_on_from_its_state():
    pruner = sgfx.Pruner(dense(), groups=3, ratio=0.6, step=0.3)
    pruner.load_state_dict(torch.load(BEFORE / "pruner.pth", weights_only=True))
    check_outputs(pruner.model, "masked")
    assert [step.index for step in pruner] == [1, 2]
    assert sgfx.plans(pruner.lower())["3"].grouped
