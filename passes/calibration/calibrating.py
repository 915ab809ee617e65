"""Calibration as passes: what the norms see of the examples, and the kept weights of all regrouped layers solved again.

The model is worked on in a copy, region by region in the order in which they run (`pairing.py`), and is changed last.
Both graphs of a region are walked in step (`paired_walk.py`), and each regrouped layer is solved in its turn, in closed
form (`layer_solver.py`), for what is sampled there (`sampling.py`). A layer without a bias gets one in the running mean
of the norm behind it. No other statistic is touched: the output of a least-squares fit has less variance than its
target, and a norm that restored it would only amplify the error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.calibration.data import EXAMPLES, Arguments
from passes.calibration.foreign_data import SeenNorm, seen_by_norms
from passes.calibration.layer_solver import resolve
from passes.calibration.paired_walk import Pair, Walk
from passes.calibration.pairing import walkable_regions
from passes.calibration.sampling import followers_at, overflow, sample_at
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


def calibrate_region(
    dense: fx.GraphModule,
    small: fx.GraphModule,
    batches: Sequence[Pair],
    path: str = "",
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Re-solve all regrouped layers of one traced part, in place in `small`.

    Args:
        dense: the eval graph of the dense model.
        small: the eval graph of the compressed one.
        batches: the arguments of every batch, for the dense and for the compressed graph.
        path: of the part in the model, for messages.
        tick: called after each layer.

    Returns:
        What has changed: new values of parameters and buffers, by their names in `small`. A layer that reads nothing,
        as where a detector finds nothing, keeps its own.

    Raises:
        InputError: the graphs differ, the batches do not fit, or a layer yields NaN, infinite or far too large values.
    """
    changed: dict[str, Tensor] = {}
    with torch.no_grad():
        walk = Walk(dense, small, batches, path)
        for stop in walk.stops():
            changed |= _solved(walk, stop)
            tick()
    return changed


def _solved(walk: Walk, stop: fx.Node) -> dict[str, Tensor]:
    """Re-solve the layer at `stop`, in place."""
    layer: Any = walk.module(stop)
    around = followers_at(walk, stop)
    norm: Any = None if around.norm is None else walk.module(around.norm)
    sample = sample_at(walk, stop, around)
    if not len(sample.wanted):
        return {}
    folded = norm is not None and layer.bias is None
    weight, bias = resolve(layer, sample, intercept=folded or layer.bias is not None)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise overflow(walk.name(stop))
    changed = _written(layer, "weight", f"{stop.target}.weight", weight)
    if layer.bias is not None:
        changed |= _written(layer, "bias", f"{stop.target}.bias", bias)
    elif around.norm is not None:
        mean = norm.running_mean - bias.to(norm.running_mean.dtype)
        changed |= _written(norm, "running_mean", f"{around.norm.target}.running_mean", mean)
    return changed


def _written(module: nn.Module, name: str, path: str, value: Tensor) -> dict[str, Tensor]:
    tensor = getattr(module, name)
    tensor.copy_(value)
    return {path: tensor}


def _write(model: nn.Module, changed: dict[str, Tensor]) -> None:
    """Give parameters and buffers new values, once all of them are found."""
    # A tensor that two modules share has two names.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    targets = [(tensors[name], value) for name, value in changed.items()]
    with torch.no_grad():
        for tensor, value in targets:
            tensor.copy_(value)
