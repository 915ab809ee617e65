"""Bars: on a terminal, on request, and nowhere else."""

import io
import sys
from contextlib import contextmanager

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
