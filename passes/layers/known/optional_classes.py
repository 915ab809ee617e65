"""Classes of packages that are not imported for their sake: where nobody has imported one, there is no object of it."""

from __future__ import annotations

import sys


def class_of(module: str, name: str) -> type | None:
    """The class of this name in a module that was imported; None if it was not, or has no such class."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None
