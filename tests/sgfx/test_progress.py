"""Bars: on a terminal, on request, and nowhere else."""

import io
import sys

from sgfx.progress import progress_bar


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
