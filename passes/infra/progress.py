"""How far a pass is: passes print nothing themselves, they are handed what shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

# Called with what is being done, how many steps there are, and what one is; entered, it gives what to call after each.
Progress: TypeAlias = Callable[[str, int, str], AbstractContextManager[Callable[[], object]]]


@contextmanager
def silent(name: str, total: int, unit: str) -> Iterator[Callable[[], object]]:
    """Show nothing."""
    yield lambda: None
