"""Lowering: grouped layers in place of dense or masked ones; every pruned weight is physically gone.

Exact: the lowered model computes what the masked one does, and has the same gradients with respect to the kept weights.
The result is checked by tracing it again: every regrouped layer in a region must be called where it was registered.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from passes.compression.pruning import PLANS
from passes.infra.compilation import Compilation, Pass
from passes.infra.manager import run_passes
from passes.layers.custom import grouped_form
from passes.layers.grouped import Grouped
from passes.layers.plan import LayerPlan, attach_plan
from passes.layers.surgery import replace_module
from passes.models.copying import copy_model
from passes.options.settings import SETTINGS, Settings
from passes.tracing.regions import REGIONS, find_regions
from passes.tracing.trace import module_calls

M = TypeVar("M", bound=nn.Module)


def lower(model: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Put grouped layers into `model` by its `plans`, in place."""
    made = {
        path: grouped_form(layer).from_dense(layer, plan)
        for path, plan in plans.items()
        if plan.grouped and not isinstance(layer := model.get_submodule(path), Grouped)
    }
    for path, layer in made.items():  # only now that all of them exist: nothing is left half done
        replace_module(model, path, layer)
    for path, plan in plans.items():
        attach_plan(model.get_submodule(path), plan)


def lowered_copy(model: M, settings: Settings, plans: dict[str, LayerPlan]) -> M:
    """A copy of `model` with grouped layers by its `plans`, made without the weights that go anyway."""
    replaced = [model.get_submodule(path).get_parameter("weight") for path, plan in plans.items() if plan.grouped]
    small = copy_model(model, shared=replaced)
    run_passes((Lowering(),), Compilation(small, {SETTINGS: settings, PLANS: plans}))
    return small


class Lowering(Pass):
    """Put grouped layers in place of all targets."""

    name = "lowering"
    requires = (SETTINGS, PLANS)
    ends = (REGIONS,)

    def run(self, compilation: Compilation) -> None:
        """Lower the model by its plans."""
        lower(compilation.model, compilation[PLANS])

    def check(self, compilation: Compilation) -> str | None:
        """Every target has as many rows as its plan has connections, and is called where it was registered."""
        plans, model = compilation[PLANS], compilation.model
        for path, plan in plans.items():
            layer = model.get_submodule(path)
            if plan.grouped and not (isinstance(layer, Grouped) and len(layer.weight) == plan.connections):
                return f"layer {path!r} was not lowered to {plan.connections} connections"
        regions = find_regions(model, leaf_modules=compilation[SETTINGS].leaf_modules)
        called = {path for _, path, _ in module_calls(regions.parts)}
        regions.empty()
        lowered = (path for path, plan in plans.items() if plan.grouped and regions.outside(path) is None)
        return next((f"nothing calls the lowered {path!r}" for path in lowered if path not in called), None)
