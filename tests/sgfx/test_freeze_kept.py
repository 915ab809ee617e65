"""Decisions are what runs, and hold for what they were made for: with or without the kernel, in which precision."""

import json

import pytest
import torch
from torch import nn

import sgfx
from passes.errors import InputError
from passes.freezing.choosing.decisions import Decisions, decisions_of
from passes.kernel import PackedConv2d
from tests.sgfx.test_freeze import IMAGES, Block, error, needs_kernel, trained

MISSING = "numba can't be imported (no)"


@pytest.fixture
def without_kernel(monkeypatch):
    """Take the kernel away, and give it back when told to."""
    with monkeypatch.context() as patch:
        patch.setattr("passes.kernel.supported", lambda: MISSING)
        yield patch.undo


def runs(frozen):
    """Whether something of a model is run by the kernel."""
    return any(isinstance(module, PackedConv2d) for module in frozen.modules())


def says(decisions):
    """Whether decisions say that, or name milliseconds of the kernel."""
    layers = decisions.layers.values()
    return any(name.startswith(("kernel", "dense")) for layer in layers for name in (layer.way, *layer.milliseconds))


@pytest.mark.filterwarnings("ignore:freeze uses the library alone")
@pytest.mark.parametrize("library", [1.0, 9.0])
def test_a_machine_without_the_kernel_is_told(without_kernel, stopwatch, library):
    model = trained(Block())
    stopwatch.ms["library alone"] = library  # slower than what was chosen, or faster: notes add up
    with pytest.warns(UserWarning, match=r"freeze uses the library alone: the kernel can't run here: numba"):
        frozen = sgfx.freeze(model, IMAGES)
    assert f"the kernel can't run here: {MISSING}" in frozen.decisions.note
    assert ("the library alone is faster" in frozen.decisions.note) == (library == 1.0)
    assert frozen.decisions.machine.endswith(", without the kernel")
    assert not runs(frozen)
    assert not says(frozen.decisions)
    again = sgfx.freeze(model, IMAGES)
    assert again.decisions == frozen.decisions  # the notes, too, each once
    with pytest.raises(InputError, match="strategy='kernel' asks for the kernel, which can't run here: numba"):
        sgfx.freeze(model, IMAGES, strategy="kernel")


@needs_kernel
@pytest.mark.filterwarnings("ignore:freeze uses the library alone")
def test_what_was_decided_without_the_kernel_is_decided_anew_where_it_is(without_kernel, tmp_path):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    sgfx.save(small, tmp_path / "small.safetensors")
    without_kernel()
    for model in (small, sgfx.load(tmp_path / "small.safetensors", into=Block().eval())):
        frozen = sgfx.freeze(model, IMAGES)
        assert runs(frozen)
        assert says(frozen.decisions)
        assert not frozen.decisions.note


@needs_kernel
def test_decisions_for_the_kernel_do_not_hold_without_it(monkeypatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    made = sgfx.freeze(small, IMAGES).decisions
    assert says(made)
    monkeypatch.setattr("passes.kernel.supported", lambda: MISSING)
    with pytest.warns(UserWarning, match="freeze uses the library alone"):
        frozen = sgfx.freeze(small, IMAGES)
    with (
        pytest.warns(UserWarning, match="freeze uses the library alone"),
        pytest.warns(UserWarning, match="freeze measures anew: .* and this is '.*, without the kernel'"),
    ):
        given = sgfx.freeze(small, IMAGES, decisions=made)
    for each in (frozen, given):
        assert not runs(each)
        assert not says(each.decisions)
        assert error(each, small, IMAGES) < 1e-5


@needs_kernel
def test_another_precision_is_decided_anew_both_ways():
    model = trained(Block())
    assert says(sgfx.freeze(model, IMAGES).decisions)
    frozen = sgfx.freeze(model.double(), IMAGES.double())
    assert not runs(frozen)
    assert not says(frozen.decisions)
    assert {layer.numbers for layer in frozen.decisions.layers.values()} == {"float64 on cpu"}
    assert error(frozen, model, IMAGES.double()) < 1e-12
    assert says(sgfx.freeze(model.float(), IMAGES).decisions)


@needs_kernel
def test_given_decisions_say_what_runs_where_the_kernel_cannot():
    model = trained(Block())
    made = sgfx.freeze(model, IMAGES).decisions
    model.double()
    frozen = sgfx.freeze(model, IMAGES.double(), decisions=made)
    assert not runs(frozen)
    assert not says(frozen.decisions)
    report = sgfx.report(Block().double().eval(), frozen, IMAGES.double())
    assert {layer.way for layer in report.layers} == {"library"}
    assert {layer.ms for layer in report.layers} == {None}
    assert not frozen.decisions.milliseconds


@needs_kernel
def test_a_second_freeze_keeps_the_times_and_the_note_of_the_whole(stopwatch):
    stopwatch.ms |= {"chosen": 3.0, "library alone": 1.0}
    model = trained(Block())
    made = sgfx.freeze(model, IMAGES).decisions
    assert made.milliseconds == {"chosen": 3.0, "library alone": 1.0}
    for given in (None, made, json.loads(json.dumps(made.to_dict()))):
        assert sgfx.freeze(model, IMAGES, decisions=given).decisions == made
    other = sgfx.freeze(model, IMAGES[:1], decisions=made).decisions
    assert not other.milliseconds
    assert not other.note


def test_times_of_a_pooling_are_those_of_its_size():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2)))
    made = sgfx.freeze(model, IMAGES).decisions
    assert made.layers["1"].milliseconds
    assert made.layers["1"].shape == (2, 8, 20, 20)
    found = sgfx.freeze(model, IMAGES[:1], decisions=made).decisions.layers["1"]
    assert (found.way, found.shape, found.milliseconds) == (made.layers["1"].way, (1, 8, 20, 20), {})


def test_decisions_of_files_from_before_are_read():
    made = sgfx.freeze(trained(Block()), IMAGES, strategy="library").decisions
    data = made.to_dict()
    for layer in data["layers"].values():
        del layer["numbers"]
    assert {layer.numbers for layer in Decisions.from_dict(data).layers.values()} == {""}


@needs_kernel
@pytest.mark.parametrize("changed", ["macs", "shape", "numbers"])
def test_decisions_that_came_with_a_model_must_be_of_its_work(stopwatch, changed):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    stopwatch.races.clear()
    sgfx.freeze(small, IMAGES)
    assert not stopwatch.races
    layer = decisions_of(small).layers["conv2"]
    object.__setattr__(layer, changed, {"macs": 1, "shape": (2, 8, 1, 1), "numbers": "float16 on cpu"}[changed])
    sgfx.freeze(small, IMAGES)
    assert stopwatch.races


def test_measuring_draws_no_random_numbers():
    model = trained(Block())
    before = torch.get_rng_state()
    sgfx.freeze(model, IMAGES)
    assert torch.equal(before, torch.get_rng_state())
