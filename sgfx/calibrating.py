"""`sgfx.calibrate`: make good in closed form what compression has lost, on unlabelled data."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial
from typing import Any, TypeVar

from torch import nn

from passes.calibration import DENSE, EXAMPLES, SEEN_NORMS, UNCALIBRATED, Arguments, SeenNorm, read_examples
from passes.errors import InputError
from passes.infra import Compilation, Facts, run_passes
from passes.layers import Grouped, cuts, is_layer, layer_shape, plans
from passes.options import SETTINGS, Settings, check_model
from passes.pipeline import INSPECTION, calibration
from sgfx.progress import progress_bar

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
    known: Facts = {SETTINGS: Settings(leaf_modules=tuple(leaves)), DENSE: dense, EXAMPLES: batches}
    compilation = run_passes(INSPECTION, Compilation(small, known))
    _warn_of_foreign_data(compilation[SEEN_NORMS])
    run_passes(calibration(partial(progress_bar, shown=progress)), compilation)
    _warn_of_the_rest(compilation[UNCALIBRATED])
    return small


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
        if not is_layer(modules.get(path)) or layer_shape(modules[path]) != plan.shape:
            raise InputError(f"small is no compiled form of dense: layer {path!r} of small is not in dense, or differs")


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


def _warn_of_the_rest(left: list[str]) -> None:
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            "not calibrated, since they read nothing or no traced part of the model calls them in eval mode: "
            f"{', '.join(left[:5])}{more}",
            stacklevel=4,
        )
