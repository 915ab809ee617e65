"""sgfx: a compiler that makes the layers of trained PyTorch vision networks group themselves.

Importing it is light: torch and the compiler are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.errors import InputError, PassError
    from passes.freezing import Decisions
    from passes.layers import LayerPlan, plans
    from sgfx.calibrating import calibrate
    from sgfx.compiler import compile
    from sgfx.exporting.exporting import Exported, export
    from sgfx.files.files import load, save
    from sgfx.freezing import freeze
    from sgfx.pruner import Pruner, Step
    from sgfx.reporting.reporting import report
    from sgfx.reporting.tables import Report, Share
    from sgfx.training.distillation import distill
    from sgfx.training.recipes import recipe
    from sgfx.training.trainer import Trainer
    from sgfx.verifying.results import Verification
    from sgfx.verifying.verification import verify

_HOMES = {
    "Decisions": "passes.freezing",
    "Exported": "sgfx.exporting.exporting",
    "InputError": "passes.errors",
    "LayerPlan": "passes.layers",
    "PassError": "passes.errors",
    "Pruner": "sgfx.pruner",
    "Report": "sgfx.reporting.tables",
    "Share": "sgfx.reporting.tables",
    "Step": "sgfx.pruner",
    "Trainer": "sgfx.training.trainer",
    "Verification": "sgfx.verifying.results",
    "calibrate": "sgfx.calibrating",
    "compile": "sgfx.compiler",
    "distill": "sgfx.training.distillation",
    "export": "sgfx.exporting.exporting",
    "freeze": "sgfx.freezing",
    "load": "sgfx.files.files",
    "plans": "passes.layers",
    "recipe": "sgfx.training.recipes",
    "report": "sgfx.reporting.reporting",
    "save": "sgfx.files.files",
    "verify": "sgfx.verifying.verification",
}

__version__ = version("sgfx")
__all__ = [
    "Decisions",
    "Exported",
    "InputError",
    "LayerPlan",
    "PassError",
    "Pruner",
    "Report",
    "Share",
    "Step",
    "Trainer",
    "Verification",
    "calibrate",
    "compile",
    "distill",
    "export",
    "freeze",
    "load",
    "plans",
    "recipe",
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used."""
    if name == "integrations":
        return import_module("sgfx.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module 'sgfx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
