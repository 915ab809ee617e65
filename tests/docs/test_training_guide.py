"""The guide to training works as it is written."""

from tests.tools.pages import DOCS, run_all

GUIDE = DOCS / "training.md"


def test_the_guide_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    run_all(GUIDE.name)
    text = GUIDE.read_text(encoding="utf-8")
    files = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").glob("**/*.*")}
    assert {"small/last.pt", "small/best.pt", "small/log.csv", "local-global/pruner.pt"} <= files
    for table in ("recipe.json", "compressed.safetensors", "log.csv", "final.safetensors"):
        assert f"local-global/{table}" in files
        assert f"`{table}`" in text
