"""The guide to criteria and passes works as it is written."""

from tests.tools.pages import run_all


def test_the_guide_runs_from_top_to_bottom():
    run_all("writing_passes.md")
