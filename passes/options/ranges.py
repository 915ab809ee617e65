"""Numbers that the caller gives: of the right type and in their range, and one wording for those that are not.

A bool is no number, and NaN lies in no range. A number of another type is a `TypeError`, one out of range an
`InputError`; what is returned is Python's own ``int`` or ``float``.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

from passes.errors import InputError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of any library's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_integer(value: object, name: str, *, least: int, below: int | None = None, hint: str = "") -> int:
    """Return an integer that is at least `least` and, if that is given, below `below`.

    Args:
        value: what was given.
        name: what the caller calls it.
        least: see above.
        below: see above.
        hint: what else to say of a number out of range.

    >>> checked_integer(0, "groups", least=1)
    Traceback (most recent call last):
        ...
    passes.errors.InputError: groups must be at least 1, not 0
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least or (below is not None and value >= below):
        upper = "" if below is None else f" and below {below}"
        raise InputError(f"{name} must be at least {least}{upper}, not {value}{hint}")
    return int(value)


def checked_number(
    value: object,
    name: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> float:
    """Return a finite number between two bounds, of each of which one form is given; without an upper one: any.

    Args:
        value: what was given.
        name: what the caller calls it.
        least: the lower bound, included.
        above: the lower bound, left out.
        most: the upper bound, included.
        below: the upper bound, left out.
        hint: what else to say of a number out of range.

    >>> checked_number(1.5, "momentum", least=0, below=1)
    Traceback (most recent call last):
        ...
    passes.errors.InputError: momentum must be at least 0 and below 1, not 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    number = float(value)
    kept = (least is None or number >= least) and (above is None or number > above)
    kept &= (most is None or number <= most) and (below is None or number < below)
    if not kept or not math.isfinite(number):
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        said = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
        unbounded = most is None and below is None
        raise InputError(f"{name} must be {' and '.join([*said, *['finite'] * unbounded])}, not {value}{hint}")
    return number


def checked_ratio(value: object, name: str) -> float:
    """Return a share of connections that is pruned, in [0, 1)."""
    said = f": it is the share of connections that is pruned{meant_as_share(value)}"
    return checked_number(value, name, least=0, below=1, hint=said)


def checked_step(value: object) -> float:
    """Return the share of connections that each pruning step adds, in (0, 1)."""
    said = f": it is the share of connections that each pruning step adds{meant_as_share(value)}"
    return checked_number(value, "step", above=0, below=1, hint=said)


def meant_as_share(value: Any) -> str:
    """What to ask behind a message that a number is no share: whether it was meant as percent.

    >>> meant_as_share(80), meant_as_share(1), meant_as_share("80")
    ('; did you mean 0.8?', '', '')
    """
    meant = isinstance(value, Real) and 2 <= float(value) < 100
    return f"; did you mean {float(value) / 100:g}?" if meant else ""
