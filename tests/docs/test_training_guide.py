"""The guide to training works as it is written."""

import re
from pathlib import Path

import sgfx

GUIDE = Path(sgfx.__file__).parent.parent / "docs" / "training.md"


def test_the_guide_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    text = GUIDE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 5
    names = {"__name__": "guide"}
    for block in blocks:
        before = text[: block.start(1)].count("\n")  # so that a failure names the line of the guide
        exec(compile("\n" * before + block[1], str(GUIDE), "exec"), names)
    files = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").glob("**/*.*")}
    assert {"small/last.pt", "small/best.pt", "small/log.csv", "local-global/pruner.pt"} <= files
    for table in ("recipe.json", "compressed.safetensors", "log.csv", "final.safetensors"):
        assert f"local-global/{table}" in files
        assert f"`{table}`" in text
