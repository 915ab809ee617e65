"""Pages of the documentation, whose blocks of Python run as tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sgfx

DOCS = Path(sgfx.__file__).parent.parent / "docs"


def sections(page: str) -> dict[str, list[tuple[int, str]]]:
    """The blocks of each section, by its title ("" before the first), with the number of lines before each."""
    text = (DOCS / page).read_text(encoding="utf-8")
    title = ""
    found: dict[str, list[tuple[int, str]]] = {title: []}
    for match in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] is not None:
            title = match[1]
            found[title] = []
        else:
            found[title].append((text[: match.start(2)].count("\n"), match[2]))
    return found


def run(page: str, blocks: list[tuple[int, str]]) -> dict[str, Any]:
    """Run blocks one after the other and return their names; a failure names the line of the page."""
    names: dict[str, Any] = {"__name__": "page"}
    for before, block in blocks:
        exec(compile("\n" * before + block, str(DOCS / page), "exec"), names)
    return names


def run_all(page: str) -> None:
    """Run a page from top to bottom."""
    blocks = [block for section in sections(page).values() for block in section]
    assert len(blocks) > 5
    run(page, blocks)
