"""Calibration as passes: what the norms see of the examples, and the kept weights of all regrouped layers solved again.

The model is worked on in a copy, region by region in the order in which they run (`pairing`), and is changed last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from passes.calibration.calibrate import calibrate_region
from passes.calibration.data import EXAMPLES, Arguments
from passes.calibration.foreign_data import SeenNorm, seen_by_norms
from passes.calibration.pairing import walkable_regions
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.progress import Progress, silent
from passes.infra.random_state import own_random_state
from passes.layers.grouped import Grouped
from passes.models.copying import unhooked_copy
from passes.options.settings import SETTINGS
from passes.tracing.tracer import join

DENSE = Fact[nn.Module]("dense")  # the model that the compilation's was made from, which is not changed
SEEN_NORMS = Fact[list[SeenNorm]]("seen norms")
UNCALIBRATED = Fact[list[str]]("uncalibrated")  # paths of the regrouped layers that keep their weights


class SeeNorms(Pass):
    """Compare what the norms of the dense model see with what they have learnt."""

    name = "see norms"
    requires = (DENSE, EXAMPLES)
    ensures = (SEEN_NORMS,)

    def run(self, compilation: Compilation) -> Facts:
        """Run the dense model on the examples."""
        with own_random_state():
            return {SEEN_NORMS: seen_by_norms(compilation[DENSE], compilation[EXAMPLES])}


class Calibration(Pass):
    """Solve the kept weights again, towards the dense model.

    Args:
        progress: shows how far it is.
    """

    name = "calibration"
    requires = (SETTINGS, DENSE, EXAMPLES)
    ensures = (UNCALIBRATED,)

    def __init__(self, progress: Progress = silent) -> None:
        """Take what shows it."""
        self._progress = progress

    def run(self, compilation: Compilation) -> Facts:
        """Solve on a copy, then write what has changed into the model."""
        small, leaves = compilation.model, compilation[SETTINGS].leaf_modules
        work = unhooked_copy(small).eval()  # all graphs that are made of it share its parameters
        layers = [path for path, module in small.named_modules() if isinstance(module, Grouped)]
        with own_random_state(), self._progress("calibrate", len(layers), "layer") as tick:
            changed = solved(compilation[DENSE], work, compilation[EXAMPLES], leaves, tick)
        _write(small, changed)
        return {UNCALIBRATED: [path for path in layers if f"{path}.weight" not in changed]}

    def check(self, compilation: Compilation) -> str | None:
        """What was solved are numbers."""
        modules = compilation.model.named_modules()
        layers = {path: each for path, each in modules if isinstance(each, Grouped)}
        for path in layers.keys() - compilation[UNCALIBRATED]:
            if not torch.isfinite(layers[path].get_parameter("weight")).all():
                return f"the weight of layer {path!r} holds NaN or infinite values"
        return None


def solved(
    dense: nn.Module,
    work: nn.Module,
    batches: list[Arguments],
    leaves: Collection[str],
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Calibrate a compressed model, in place, and return what has changed.

    Args:
        dense: the model that it was made from.
        work: the compressed model, in eval mode, without hooks.
        batches: the arguments of both.
        leaves: paths of modules that are not to be traced into.
        tick: called after each layer.

    Returns:
        The new values, by the names of parameters and buffers.
    """
    changed: dict[str, Tensor] = {}
    for path, theirs, mine, pairs in walkable_regions(dense, work, batches, leaves):
        for name, value in calibrate_region(theirs, mine, pairs, path, tick).items():
            changed[join(path, name)] = value
            holder, _, leaf = join(path, name).rpartition(".")
            getattr(work.get_submodule(holder), leaf).detach().copy_(value)  # the graphs' buffers are copies
    return changed


def _write(model: nn.Module, changed: dict[str, Tensor]) -> None:
    """Give parameters and buffers new values, once all of them are found."""
    # A tensor that two modules share has two names.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    targets = [(tensors[name], value) for name, value in changed.items()]
    with torch.no_grad():
        for tensor, value in targets:
            tensor.copy_(value)
