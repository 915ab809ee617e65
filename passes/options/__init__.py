"""What the caller asked for, checked."""

from passes.options.arguments import ExampleInputs, as_inputs, by_place_and_name, call_model
from passes.options.checks import LeafModules, check_model, checked_settings, listed, resolved_leaves
from passes.options.ranges import checked_integer, checked_number, checked_step, is_integer, meant_as_share
from passes.options.settings import SETTINGS, Criterion, Settings

__all__ = [
    "SETTINGS",
    "Criterion",
    "ExampleInputs",
    "LeafModules",
    "Settings",
    "as_inputs",
    "by_place_and_name",
    "call_model",
    "check_model",
    "checked_integer",
    "checked_number",
    "checked_settings",
    "checked_step",
    "is_integer",
    "listed",
    "meant_as_share",
    "resolved_leaves",
]
