"""Bars: on a terminal, on request, and nowhere else."""

import io
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from tqdm import tqdm

import sgfx
from sgfx.progress import progress_bar
from tests.sgfx.test_freeze import IMAGES, Block, trained


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(**options):
    with progress_bar("counting", 3, "sheep", **options) as tick:
        for _ in range(3):
            tick()


def test_a_terminal_shows_what_is_done_and_is_left_clean(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    work()
    shown = terminal.getvalue()
    assert "counting" in shown
    assert "/3" in shown
    assert shown.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_nothing_is_shown_where_nobody_asked_or_nobody_sees_it(monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        work(shown=False)
    assert terminal.getvalue() == ""
    work()
    assert capfd.readouterr() == ("", "")


def test_freezing_shows_how_many_layers_are_decided(monkeypatch):
    shown = {}
    for progress in (True, False):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        sgfx.freeze(trained(Block()), IMAGES, progress=progress)
        shown[progress] = terminal.getvalue()
    assert "freeze" in shown[True]
    assert "0/6" in shown[True]  # five layers and a pooling
    assert shown[False] == ""


def test_freezing_counts_each_layer_once(monkeypatch):
    ticks = []

    @contextmanager
    def counting(name, total, unit, *, shown):
        yield lambda: ticks.append((name, total, unit))

    monkeypatch.setattr("sgfx.freezing.progress_bar", counting)
    model = trained(Block())
    for decisions in (None, sgfx.freeze(model, IMAGES).decisions):
        ticks.clear()
        sgfx.freeze(model, IMAGES, decisions=decisions)
        assert ticks == 6 * [("freeze", 6, "layer")]


@pytest.fixture
def models():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return dense, sgfx.compile(dense, groups=2, ratio=0.5), torch.randn(32, 6)


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (sgfx.calibrate, {"calibrate": "3/3"}),
        (partial(sgfx.distill, steps=4), {"distill": "4/4"}),
        (
            lambda dense, small, x: sgfx.compile(dense, groups=2, budget={"params": 0.7}, calibration=x),
            {"budget": "3/3", "calibrate": "3/3"},
        ),
    ],
    ids=["calibrate", "distill", "compile"],
)
def test_long_calls_show_how_far_they_are(models, call, shown, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr(sys.modules["sgfx.progress"], "tqdm", partial(tqdm, mininterval=0))
    call(*models)
    for name, steps in shown.items():
        assert any(name in line and steps in line for line in terminal.getvalue().split("\r"))
    before = terminal.getvalue()
    if "budget" not in shown:  # compile has no such option
        call(*models, progress=False)
    assert terminal.getvalue() == before
    monkeypatch.undo()
    call(*models)
    assert capfd.readouterr() == ("", "")
