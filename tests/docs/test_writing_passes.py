"""The guide to criteria and passes works as it is written."""

import re
from pathlib import Path

import sgfx

GUIDE = Path(sgfx.__file__).parent.parent / "docs" / "writing_passes.md"


def test_the_guide_runs_from_top_to_bottom():
    text = GUIDE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 5
    names = {"__name__": "guide"}
    for block in blocks:
        before = text[: block.start(1)].count("\n")  # so that a failure names the line of the guide
        exec(compile("\n" * before + block[1], str(GUIDE), "exec"), names)
