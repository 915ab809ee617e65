"""Bars for calls that take long: on a terminal alone, and gone when the call is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(name: str, total: int | None, unit: str, *, shown: bool = True) -> Iterator[Callable[[], object]]:
    """Show a bar while this lasts, on stderr where that is a terminal.

    Args:
        name: what is being done.
        total: how many steps there are, or None where that isn't known.
        unit: what one step is.
        shown: whether there is a bar at all.

    Yields:
        A function to be called after each step. Passes, which print nothing themselves, are handed it.
    """
    with tqdm(total=total, desc=name, unit=unit, leave=False, disable=None if shown else True) as bar:
        yield bar.update
