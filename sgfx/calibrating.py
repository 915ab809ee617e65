"""`sgfx.calibrate`: make good in closed form what compression has lost, on unlabelled data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from passes.calibration.calibrate import calibrate_region
from passes.calibration.data import Arguments, parted, read_examples
from passes.calibration.foreign_data import SeenNorm, seen_by_norms
from passes.calibration.pairing import walkable_regions
from passes.errors import InputError
from passes.infra.random_state import own_random_state
from passes.layers.channel_cut import cuts
from passes.layers.grouped import Grouped
from passes.layers.plan import layer_shape, plans
from passes.models.copying import copy_inputs, unhooked_copy
from passes.options.arguments import call
from passes.options.checks import check_model
from passes.tracing.tracer import join
from sgfx.progress import progress_bar
from sgfx.training.teacher import distance

M = TypeVar("M", bound=nn.Module)
FOREIGN = 0.05  # mean divergence of norms; docs/accuracy.md has that of own and of foreign images


def calibrate(dense: nn.Module, small: M, data: Any, *, progress: bool = True) -> M:
    """Re-solve the kept weights of a compressed model in closed form, layer by layer, towards the dense model.

    No labels and no training. Changed are the weights and biases of regrouped layers, and the running mean of the norm
    behind a layer without a bias. Both models are run in eval mode, on copies without hooks. Layers that can't be
    reached keep their weights, and a warning names them. Another warning says where the data do not look like what the
    model was trained on, which shows in its batch norms alone.

    Args:
        dense: the model before `sgfx.compile`; it is not changed.
        small: what `sgfx.compile` (without ``eliminate=True``) or `Pruner.lower` made of it, changed in place once
            everything has succeeded.
        data: a tensor ``[N, …]`` of examples, or an iterable of batches, read once; a batch is a tensor, or a tuple or
            list that starts with the input (with all inputs, where the model's forward requires several), or a dict of
            keyword arguments. A few hundred examples from the training data are enough.
        progress: show a progress bar, on a terminal.

    Returns:
        `small`.

    Raises:
        InputError: (a ValueError) the data are empty, hold NaN or do not fit, activations overflow, or `small` is no
            compiled form of `dense`, or filters have been eliminated from it. Nothing is changed then.
        TypeError: an argument is of the wrong type.
    """
    check_compiled(dense, small)
    if cuts(small):
        raise InputError("filters have been eliminated from small: give the data to sgfx.compile(…, calibration=data)")
    return calibrate_on(dense, small, read_examples(data, "data", small), progress=progress)


def calibrate_on(
    dense: nn.Module, small: M, batches: list[Arguments], leaves: Collection[str] = (), *, progress: bool = True
) -> M:
    """The same for a `small` that is known to fit, on arguments that were read already.

    `leaves` are the paths of modules that are not to be traced into.
    """
    work = unhooked_copy(small)  # all graphs that are made of it share its parameters
    with own_random_state():
        _warn_of_foreign_data(seen_by_norms(dense, batches))
        layers = sum(isinstance(module, Grouped) for module in work.modules())
        with progress_bar("calibrate", layers, "layer", shown=progress) as tick:
            changed = _calibrated(dense, work.eval(), batches, leaves, tick)
    # A tensor that two modules share has two names.
    tensors = dict(small.named_parameters(remove_duplicate=False)) | dict(small.named_buffers(remove_duplicate=False))
    targets = [(tensors[name], value) for name, value in changed.items()]
    with torch.no_grad():
        for tensor, value in targets:
            tensor.copy_(value)
    _warn_of_the_rest(small, changed)
    return small


def held_out_error(dense: nn.Module, small: nn.Module, batches: list[Arguments], leaves: Collection[str] = ()) -> float:
    """How far the outputs of a compressed model are from the dense one's, calibrated on a part of the examples.

    Args:
        dense: the model; it is not changed.
        small: what was made of it; it is not changed.
        batches: arguments; one example in four is judged by.
        leaves: paths of modules that are not to be traced into.

    Returns:
        The mean distance on the examples that are judged by; NaN where there are none, they can't be told apart from
        what else a batch holds, or outputs can't be compared.
    """
    fitted, judged = parted(batches)
    if not fitted:
        return math.nan
    teacher, work = unhooked_copy(dense).eval(), unhooked_copy(small).eval()
    layers = sum(isinstance(module, Grouped) for module in work.modules())
    with own_random_state(), torch.no_grad(), progress_bar("compare ratios", layers, "layer") as tick:
        try:
            _calibrated(dense, work, fitted, leaves, tick)
            found = [distance(call(work, copy_inputs(x)), call(teacher, copy_inputs(x))).item() for x in judged]
        except InputError:  # what is really wrong with the examples is said where all of them are used
            return math.nan
    return sum(found) / len(found) if found else math.nan


def check_compiled(dense: nn.Module, small: nn.Module) -> None:
    """Refuse a `small` that is not a compiled form of `dense`, eliminated or not."""
    check_model(dense)
    check_model(small)
    modules = dict(dense.named_modules())
    found = plans(small)
    grouped = [path for path, module in small.named_modules() if isinstance(module, Grouped)]
    if not grouped:
        raise InputError("small has no regrouped layers: it must be what sgfx.compile or Pruner.lower returned")
    if all(isinstance(modules.get(path), Grouped) for path in grouped):
        raise InputError("dense has been compiled itself: give the model from before sgfx.compile")
    for path, plan in found.items():
        if path not in modules or not hasattr(modules[path], "weight") or layer_shape(modules[path]) != plan.shape:
            raise InputError(f"small is no compiled form of dense: layer {path!r} of small is not in dense, or differs")


def _calibrated(
    dense: nn.Module,
    work: nn.Module,
    batches: list[Arguments],
    leaves: Collection[str],
    tick: Callable[[], object],
) -> dict[str, Tensor]:
    """Calibrate `work`, region by region in the order in which they run; returns what has changed."""
    changed: dict[str, Tensor] = {}
    for path, theirs, mine, pairs in walkable_regions(dense, work, batches, leaves):
        for name, value in calibrate_region(theirs, mine, pairs, path, tick).items():
            changed[join(path, name)] = value
            holder, _, leaf = join(path, name).rpartition(".")
            getattr(work.get_submodule(holder), leaf).detach().copy_(value)  # the graphs' buffers are copies
    return changed


def _warn_of_foreign_data(norms: list[SeenNorm]) -> None:
    mean = sum(norm.divergence for norm in norms) / max(len(norms), 1)
    if mean > FOREIGN:
        worst = max(norms, key=lambda norm: norm.divergence)
        warnings.warn(
            f"the data do not look like what the model was trained on: {len(norms)} norms see other statistics than "
            f"they have learnt, with a divergence of {mean:.2f} on average (below {FOREIGN} on training images). Worst "
            f"is {worst.path!r}: means {worst.shift:.1f} standard deviations off, variances {worst.spread:.2g} times "
            "as large. The model is being fitted to these data, and may lose what it knows of others: give images "
            "like those of the training, normalised in the same way",
            stacklevel=4,
        )


def _warn_of_the_rest(small: nn.Module, changed: dict[str, Tensor]) -> None:
    left = [
        path
        for path, module in small.named_modules()
        if isinstance(module, Grouped) and f"{path}.weight" not in changed
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            "not calibrated, since they read nothing or no traced part of the model calls them in eval mode: "
            f"{', '.join(left[:5])}{more}",
            stacklevel=4,
        )
