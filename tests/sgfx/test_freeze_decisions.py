"""What freezing decides for each layer and for the whole, by measuring: kept, carried along, or not taken."""

import copy
import json

import pytest
import torch
from torch import nn

import sgfx
import sgfx.freezing
from passes.elimination.elimination import Elimination
from passes.errors import InputError
from passes.freezing.choosing.decisions import Decisions, decisions_of
from passes.freezing.rewrites.layers import MakeRecipes
from tests.sgfx.test_freeze import IMAGES, Block, error, needs_kernel, trained


def test_decisions_are_kept_and_taken_without_measuring(stopwatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    made = frozen.decisions
    assert decisions_of(small) is made
    assert made.layers["conv2"].milliseconds[made.layers["conv2"].name] > 0
    assert made.layers["stem"].macs == 2 * 20 * 20 * 8 * 27
    assert "conv2" in str(made)
    again = Decisions.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    stopwatch.races.clear()
    for decisions in (None, made, made.to_dict()):
        other = sgfx.freeze(small, IMAGES, decisions=decisions)
        assert {path: layer.name for path, layer in other.decisions.layers.items()} == {
            path: layer.name for path, layer in made.layers.items()
        }
        assert error(other, small, IMAGES) < 1e-5
    assert not stopwatch.races


def test_decisions_travel_in_files(tmp_path, stopwatch):
    model = trained(Block())
    small = sgfx.compile(model, groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    sgfx.save(small, tmp_path / "small.safetensors")
    loaded = sgfx.load(tmp_path / "small.safetensors", into=trained(Block()))
    assert decisions_of(loaded) == frozen.decisions
    stopwatch.races.clear()
    assert torch.equal(sgfx.freeze(loaded, IMAGES)(IMAGES), frozen(IMAGES))
    assert not stopwatch.races


def test_what_was_decided_on_another_machine_does_not_hold_here(monkeypatch, stopwatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    monkeypatch.setattr("sgfx.freezing.machine", lambda: "another machine")
    stopwatch.races.clear()
    sgfx.freeze(small, IMAGES)
    assert stopwatch.races


def test_a_forced_strategy_comes_before_decisions_that_came_with_the_model():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    sgfx.freeze(small, IMAGES)
    ways = {layer.way for layer in sgfx.freeze(small, IMAGES, strategy="library").decisions.layers.values()}
    assert ways == {"library"}


def test_a_model_is_fused_once_and_a_dense_one_is_not_searched_for_filters(monkeypatch):
    done = []
    for kind in (MakeRecipes, Elimination):
        monkeypatch.setattr(kind, "run", lambda self, given, run=kind.run: done.append(self.name) or run(self, given))
    model = trained(Block())
    sgfx.freeze(model, IMAGES)
    assert done == ["make recipes"]
    sgfx.freeze(sgfx.compile(model, groups=3, ratio=0.5), IMAGES)
    assert done == ["make recipes", "elimination", "make recipes"]


def test_copies_keep_their_decisions():
    frozen = sgfx.freeze(trained(Block()), IMAGES, strategy="library")
    assert copy.deepcopy(frozen).decisions == frozen.decisions


def test_decisions_that_came_with_a_model_are_taken_for_the_same_layers_and_sizes_alone(stopwatch):
    dense = trained(Block())
    made = sgfx.freeze(dense, IMAGES).decisions
    stopwatch.ms["library"] = 5.0
    assert sgfx.freeze(dense, IMAGES).decisions.layers == made.layers
    small = sgfx.compile(dense, groups=3, ratio=0.5)
    for model, images in ((small, IMAGES), (dense, IMAGES[:1])):
        stopwatch.ms["library"] += 1
        found = sgfx.freeze(model, images).decisions
        for path in ("conv1", "conv2", "down"):
            assert found.layers[path].macs < made.layers[path].macs
            assert found.layers[path].milliseconds != made.layers[path].milliseconds


def test_decisions_given_for_other_sizes_keep_the_ways_and_not_the_times():
    model = trained(Block())
    made = sgfx.freeze(model, IMAGES).decisions
    found = sgfx.freeze(model, IMAGES[:1], decisions=made).decisions
    for path in ("stem", "conv1", "conv2", "down"):
        assert found.layers[path].name == made.layers[path].name
        assert found.layers[path].macs == made.layers[path].macs // 2
        assert not found.layers[path].milliseconds


def test_decisions_of_other_sizes_with_as_many_macs_are_not_taken(stopwatch):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    made = sgfx.freeze(model, torch.rand(4, 3, 16, 16)).decisions
    stopwatch.ms["library"] = 5.0
    found = sgfx.freeze(model, torch.rand(1, 3, 32, 32)).decisions
    assert found.layers["0"].macs == made.layers["0"].macs
    assert found.layers["0"].shape == (1, 3, 32, 32)
    assert found.layers["0"].milliseconds != made.layers["0"].milliseconds


@needs_kernel
def test_a_regrouped_layer_may_be_fastest_with_its_dense_weight(stopwatch):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.1)
    stopwatch.ms |= {"dense": 1.0, "kernel": 2.0}
    frozen = sgfx.freeze(small, IMAGES)
    layers = frozen.decisions.layers
    assert {path for path, layer in layers.items() if layer.way == "dense"} == {"conv1", "conv2", "down", "head"}
    assert all(len(layer.tiling) == 2 for path, layer in layers.items() if layer.way == "dense")
    assert error(frozen, small, IMAGES) < 1e-5
    report = sgfx.report(Block(), frozen, IMAGES)
    assert report.macs < report.macs_dense  # what is pruned counts as pruned
    again = sgfx.freeze(small, IMAGES, decisions=json.loads(json.dumps(frozen.decisions.to_dict())))
    assert again.decisions.layers == layers
    assert torch.equal(again(IMAGES), frozen(IMAGES))


@needs_kernel
@pytest.mark.parametrize(
    ("whole", "ways", "note"),
    [
        ({"chosen": 1.0, "dense": 2.0, "library alone": 3.0}, {"kernel"}, ""),
        ({"chosen": 2.0, "dense": 1.0, "library alone": 3.0}, {"dense"}, "regrouping is not faster here"),
        ({"chosen": 3.0, "dense": 2.0, "library alone": 1.0}, {"library"}, "the library alone is faster"),
    ],
)
def test_a_whole_that_is_not_faster_than_dense_is_run_densely(stopwatch, whole, ways, note):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    race = stopwatch.race
    stopwatch.race = lambda names, patience: dict(whole) if "chosen" in names else race(names, patience)
    frozen = sgfx.freeze(small, IMAGES)
    assert {frozen.decisions.layers[path].way for path in ("conv1", "conv2", "down")} == ways
    assert frozen.decisions.note.startswith(note)
    assert bool(frozen.decisions.note) == bool(note)
    assert frozen.decisions.milliseconds == whole
    assert error(frozen, small, IMAGES) < 1e-5
    assert sgfx.freeze(small, IMAGES).decisions.layers == frozen.decisions.layers  # they came with the model


@needs_kernel
def test_of_a_dense_model_there_is_no_denser_form():
    frozen = sgfx.freeze(trained(Block()), IMAGES)
    assert list(frozen.decisions.milliseconds) == ["chosen", "library alone"]


@pytest.mark.parametrize(
    ("way", "tiling"), [("foo", []), ("dense", []), ("kernel", [0, 4]), ("kernel", [28]), ("library", [28, 4])]
)
def test_decisions_that_name_no_way(way, tiling):
    data = sgfx.freeze(trained(Block()), IMAGES, strategy="library").decisions.to_dict()
    data["layers"]["stem"] |= {"way": way, "tiling": tiling}
    with pytest.raises(InputError, match="the decision for layer 'stem' must be one of library, channels_last, kernel"):
        sgfx.freeze(Block().eval(), IMAGES, decisions=data)


def test_decisions_given_for_another_machine_are_not_taken_in_silence(monkeypatch):
    model = trained(Block())
    made = sgfx.freeze(model, IMAGES).decisions
    monkeypatch.setattr("sgfx.freezing.machine", lambda: "another machine")
    with pytest.warns(
        UserWarning, match=r"freeze measures anew: the decisions were made on .*, and this is 'another ma"
    ):
        found = sgfx.freeze(model, IMAGES, decisions=made).decisions
    assert found.machine == "another machine"


@needs_kernel
def test_where_whole_and_parts_disagree_the_whole_is_measured_again(stopwatch):
    small, race, wholes = sgfx.compile(trained(Block()), groups=3, ratio=0.5), stopwatch.race, []

    def disturbed_once(ways, patience):
        if "chosen" not in ways:
            return race(ways)
        wholes.append(patience)
        return {name: 5.0 if name == "chosen" and len(wholes) == 1 else 4.0 for name in ways} | (
            {"chosen": 1.0} if len(wholes) > 1 else {}
        )

    stopwatch.race = disturbed_once
    found = sgfx.freeze(small, IMAGES).decisions
    assert wholes == [1.0, 4]  # with more patience
    assert found.layers["conv2"].way == "kernel"
    assert found.milliseconds == {"chosen": 1.0, "dense": 4.0, "library alone": 4.0}
    assert not found.note


@needs_kernel
def test_on_a_busy_machine_the_parts_decide_and_nothing_is_kept(stopwatch, tmp_path):
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    stopwatch.ms |= {"chosen": 9.0, "library alone": 1.0}
    stopwatch.noisy = True
    found = sgfx.freeze(small, IMAGES).decisions
    assert found.layers["conv2"].way == "kernel"
    assert found.note.startswith("the machine was busy: threads waited for a core")
    assert decisions_of(small) is None
    sgfx.save(small, tmp_path / "small.safetensors")
    assert decisions_of(sgfx.load(tmp_path / "small.safetensors", into=Block())) is None
    stopwatch.noisy = False
    stopwatch.races.clear()
    found = sgfx.freeze(small, IMAGES).decisions
    assert stopwatch.races
    assert found.layers["conv2"].way == "library"  # as the whole says
    assert decisions_of(small) is found


@pytest.mark.usefixtures("real_stopwatch")
def test_measured_in_earnest():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, IMAGES)
    made = frozen.decisions
    assert error(frozen, small, IMAGES) < 1e-5
    assert all(ms > 0 for ms in (*made.layers["conv2"].milliseconds.values(), *made.milliseconds.values()))
    assert (decisions_of(small) is made) == ("the machine was busy" not in made.note)


@needs_kernel
@pytest.mark.parametrize(("program", "ways"), [(0.5, {"kernel"}), (3.0, {"library"})])
def test_a_whole_in_programs_is_taken_if_it_is_faster(stopwatch, program, ways):
    stopwatch.ms |= {"library": 1.0, "kernel": 1.01, "chosen": 1.0, "in programs": program}
    model = trained(Block())
    frozen = sgfx.freeze(model, IMAGES)
    assert {frozen.decisions.layers[path].way for path in ("conv1", "conv2", "down")} == ways
    assert frozen.decisions.milliseconds == {"in programs": program, "chosen": 1.0, "library alone": 3.0}
    assert not frozen.decisions.note
    assert error(frozen, model, IMAGES) < 1e-5
