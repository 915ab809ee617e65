"""The guide to detection works as it is written."""

import pytest

from tests.tools.pages import run_all


@pytest.mark.filterwarnings("ignore:not calibrated, since they read nothing", "ignore:distill gained nothing")
def test_the_guide_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    run_all("detection.md")
    assert (tmp_path / "runs/cells/best.pt").exists()
