"""Lowering: grouped layers in place of dense or masked ones; every pruned weight is physically gone.

Exact: the lowered model computes what the masked one does, and has the same gradients with respect to the kept weights.
The result is checked by tracing it again: every regrouped layer in a region must be called where it was registered.
"""

from __future__ import annotations

from torch import nn

from passes.infra.compilation import Pass, Unit
from passes.layers.custom import grouped_form
from passes.layers.grouped import Grouped
from passes.layers.plan import LayerPlan, attach_plan
from passes.layers.surgery import replace_module
from passes.tracing.regions import find_regions
from passes.tracing.trace import calls


def lower(model: nn.Module, plans: dict[str, LayerPlan]) -> bool:
    """Put grouped layers into `model` by its `plans`, in place; return whether anything changed."""
    made = {
        path: grouped_form(layer).from_dense(layer, plan)
        for path, plan in plans.items()
        if plan.grouped and not isinstance(layer := model.get_submodule(path), Grouped)
    }
    for path, layer in made.items():  # only now that all of them exist: nothing is left half done
        replace_module(model, path, layer)
    for path, plan in plans.items():
        attach_plan(model.get_submodule(path), plan)
    return bool(made)


class Lowering(Pass):
    """Put grouped layers in place of all targets."""

    name = "lowering"
    requires = ("plans",)

    def run(self, unit: Unit) -> bool:
        """Lower the model by its plans."""
        return lower(unit.model, unit.plans)

    def check(self, unit: Unit) -> str | None:
        """Every target has as many rows as its plan has connections, and is called where it was registered."""
        for path, plan in unit.plans.items():
            layer = unit.model.get_submodule(path)
            if plan.grouped and not (isinstance(layer, Grouped) and len(layer.weight) == plan.connections):
                return f"layer {path!r} was not lowered to {plan.connections} connections"
        regions = find_regions(unit.model, leaf_modules=unit.settings.leaf_modules)
        called = {path for _, path, _ in calls(regions.parts)}
        lowered = (path for path, plan in unit.plans.items() if plan.grouped and regions.outside(path) is None)
        return next((f"nothing calls the lowered {path!r}" for path in lowered if path not in called), None)
