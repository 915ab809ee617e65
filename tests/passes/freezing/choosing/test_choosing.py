"""Choosing layers one after the other, with no more in memory than running them takes."""

import gc

import pytest
import torch
from torch import nn

import sgfx
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.choosing.stopwatch import Stopwatch
from tests.sgfx.test_freeze import error


def bytes_of_pictures(size):
    """Bytes of all tensors alive of pictures of this size, each storage once."""
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-2:] == (size, size)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


def test_inputs_are_held_one_at_a_time(monkeypatch):
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 1, 1), nn.Sigmoid()) for _ in range(6)]
    model, images = nn.Sequential(*layers).eval(), torch.rand(1, 4, 96, 96)
    before, held = bytes_of_pictures(96), []

    def race(self, ways, patience=1.0):
        held.append(bytes_of_pictures(96) - before)
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(Stopwatch, "race", race)
    frozen = sgfx.freeze(model, images)
    assert len(held) == 12 + 1  # and once for the whole
    assert max(held) <= 3 * images.nbytes  # two copies of the example, and what the layer reads
    monkeypatch.undo()
    assert error(frozen, model, images) < 1e-5


@pytest.mark.parametrize(
    ("milliseconds", "way"),
    [
        ({"library": 1.00, "kernel 28 4": 1.20, "kernel 14 4": 1.03}, "kernel 14 4"),
        ({"library": 1.00, "kernel 28 4": 1.20, "dense 28 4": 1.03}, "dense 28 4"),
        ({"library": 1.00, "kernel 28 4": 1.05}, "library"),
        ({"library": 1.00, "channels_last": 0.50}, "channels_last"),
    ],
)
def test_a_layer_leaves_a_program_only_for_what_that_costs(milliseconds, way):
    best = min(milliseconds, key=milliseconds.__getitem__)
    decision = LayerDecision.of(best, milliseconds, LayerDecision("library"))
    assert decision.within_program().name == way
