"""How `ignore` and `overrides` name modules: exact dotted paths, or glob patterns over whole dotted paths.

A ``*`` matches dots too: ``layer1.*`` covers everything below ``layer1``; ``conv1`` is not ``layer1.0.conv1``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase


def is_pattern(entry: str) -> bool:
    """Whether an entry is a glob pattern rather than an exact name."""
    return any(character in entry for character in "*?[")


def matches(entry: str, path: str) -> bool:
    """Whether a name or pattern means this very path.

    >>> matches("conv1", "layer1.0.conv1"), matches("*.conv1", "layer1.0.conv1")
    (False, True)
    """
    return fnmatchcase(path, entry) if is_pattern(entry) else path == entry


def holders_of(path: str) -> list[str]:
    """Paths of the modules that hold the one at `path`, from the outside in, without the model itself.

    >>> holders_of("layer1.0.conv1")
    ['layer1', 'layer1.0']
    """
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def covers(entry: str, path: str) -> bool:
    """Whether a name or pattern means this path or a module that holds it ("" is the whole model).

    >>> covers("layer1", "layer1.0.conv1"), covers("layer1", "layer10.conv1")
    (True, False)
    """
    if not entry:
        return True
    return any(matches(entry, each) for each in (*holders_of(path), path))
