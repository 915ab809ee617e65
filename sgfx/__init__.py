"""sgfx: a compiler that makes the layers of trained PyTorch vision networks group themselves.

Importing it is light: torch and the compiler are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.errors import InputError, PassError
    from passes.freezing.decisions import Decisions
    from passes.plan import LayerPlan, plans
    from sgfx.calibration import calibrate
    from sgfx.compiler import compile
    from sgfx.distillation import distill
    from sgfx.exporting import Exported, export
    from sgfx.files import load, save
    from sgfx.freezing import freeze
    from sgfx.pruner import Pruner, Step
    from sgfx.reporting import report
    from sgfx.reports import Report, Share
    from sgfx.training import Trainer
    from sgfx.verification import Verification, verify

_HOMES = {
    "Decisions": "passes.freezing.decisions",
    "Exported": "sgfx.exporting",
    "InputError": "passes.errors",
    "LayerPlan": "passes.plan",
    "PassError": "passes.errors",
    "Pruner": "sgfx.pruner",
    "Report": "sgfx.reports",
    "Share": "sgfx.reports",
    "Step": "sgfx.pruner",
    "Trainer": "sgfx.training",
    "Verification": "sgfx.verification",
    "calibrate": "sgfx.calibration",
    "compile": "sgfx.compiler",
    "distill": "sgfx.distillation",
    "export": "sgfx.exporting",
    "freeze": "sgfx.freezing",
    "load": "sgfx.files",
    "plans": "passes.plan",
    "report": "sgfx.reporting",
    "save": "sgfx.files",
    "verify": "sgfx.verification",
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
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sgfx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
