"""Callbacks that prune inside the training loops of other libraries, each in the module of its name.

Nothing is imported here: `sgfx.integrations.lightning` and `sgfx.integrations.transformers` import their library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Import an integration when it is first used."""
    if name not in ("lightning", "transformers"):
        raise AttributeError(f"module 'sgfx.integrations' has no attribute {name!r}")
    return import_module(f"sgfx.integrations.{name}")
