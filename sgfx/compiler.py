"""`sgfx.compile`: the standard list of passes in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from passes.calibration import BUDGET, EXAMPLES, FIT, Arguments, Fit, read_examples
from passes.compression import PLANS, lowered_copy
from passes.elimination import remove_unread_filters
from passes.errors import InputError
from passes.freezing import hand_on_times, timing_of
from passes.infra import Compilation, Facts, Pass, run_passes
from passes.layers import LayerPlan
from passes.models import adopt
from passes.options import (
    SETTINGS,
    Criterion,
    ExampleInputs,
    LeafModules,
    as_inputs,
    check_model,
    checked_settings,
    listed,
    resolved_leaves,
)
from passes.pipeline import ANALYSIS, GROUPING, PRUNING
from passes.pipeline import budget as spending_passes
from passes.tracing import REGIONS
from sgfx.budgets import TIME, Asked, budget_of, checked_budget, warn_of_fit
from sgfx.calibrating import calibrate_on
from sgfx.progress import progress_bar
from sgfx.pruner import Pruner, Step

M = TypeVar("M", bound=nn.Module)
CheckedBudget: TypeAlias = tuple[str, float] | None


def compile(
    model: M,
    *,
    groups: int = 8,
    ratio: float | None = None,
    budget: Asked | None = None,
    linear_ratio: float | None = None,
    ignore: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, Mapping[str, float]] | None = None,
    criterion: Criterion = "l1",
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    inplace: bool = False,
    step: float | None = None,
    finetune: Callable[[M, Step], object] | None = None,
    eliminate: bool = False,
    leaf_modules: LeafModules = (),
    calibration: Any = None,
) -> M:
    """Regroup the convolutions and linear layers of a trained model physically.

    The result is a copy of `model`, of the same class, with grouped layers in the places of the dense ones. It is an
    ordinary module: train it, pickle it, move it. `sgfx.plans` and `sgfx.report` say what became of each layer.

    Args:
        model: a trained model. It is neither run nor changed. If torch.fx can't trace it whole, its
            largest traceable parts are compiled.
        groups: groups per layer, at most; clipped to the layer's filters.
        ratio: share of the connections of each layer that is **pruned**, in [0, 1): 0.8 leaves a fifth.
        budget: instead of a ratio, ``{"macs": share}`` or ``{"params": share}``: the share of the model's total, as
            `sgfx.report` counts it, that **remains**; or ``{"ms": milliseconds}`` that the frozen model takes on this
            machine for `example_inputs`. Each layer gets its own ratio, so that the error measured on the `calibration`
            data is least. Milliseconds are met within 10 %: models are frozen and measured on the way, and the result
            keeps the decisions, and what `sgfx.report` shows as predicted and measured.
        linear_ratio: the ratio of linear layers; None means `ratio`.
        ignore: names, glob patterns or modules to leave alone; a name covers everything below it.
        overrides: ``{name or pattern: {"groups": …, "ratio": …}}``. An exact name also lifts the rules that leave the
            first convolution and layers of fewer than 4 filters or inputs alone; a pattern only sets values for layers
            that are regrouped anyway. Later patterns win over earlier ones, exact names over patterns.
        criterion: ``"l1"``, ``"l2"``, or a callable from the weight ``[C_out, C_in, *kernel]`` to an importance
            ``[C_out, C_in]``, finite and not negative (the paper's eq. 5, 6).
        example_inputs: a tensor, a tuple of positional arguments (the last may be a dict of keywords), or such a dict;
            checked against the model. If it can't be traced whole, they are run through a copy without hooks, to see
            how the layers outside the traced parts are used; without them these layers are left alone. A budget of
            milliseconds needs them.
        seed: seed of the clustering; no global random state is read or changed.
        inplace: change `model` itself, after everything has succeeded on a copy, and return it.
        step: prune in steps of this share, as the paper's local scheme does, instead of at once.
        finetune: ``finetune(model, step)`` trains the masked model in place after each step. An exception from it
            carries the `Pruner` as its attribute ``pruner``, which goes on from the step that failed.
        eliminate: also remove the filters whose output nobody reads any more, with their norms' entries, all the way
            up the network. Exact too, but tensors then have fewer channels than in `model`.
        leaf_modules: names, patterns, modules or classes of modules that are not to be traced into: what cannot be
            understood from their code. Layers inside them count as outside the traced parts.
        calibration: unlabelled examples, as `sgfx.calibrate` takes them, to re-solve the kept weights on.

    Raises:
        InputError: (a ValueError) the model or an option can't be compiled; names the layer and the way out.
        TypeError: an argument is of the wrong type.
    """
    if finetune is not None and not callable(finetune):
        raise TypeError(f"finetune must be callable as finetune(model, step), not {finetune!r}")
    options: dict[str, Any] = {
        "groups": groups,
        "ratio": 0.0 if ratio is None else ratio,
        "linear_ratio": linear_ratio,
        "ignore": ignore,
        "overrides": overrides,
        "criterion": criterion,
        "example_inputs": example_inputs,
        "seed": seed,
        "leaf_modules": listed(leaf_modules, "leaf_modules"),  # once: an iterator gives its entries to the first reader
    }
    share = _asked(ratio, budget, step, calibration)
    if share is not None and share[0] == TIME:
        _check_time(example_inputs, eliminate)
    with torch.inference_mode(False):  # or what is made here could never be trained
        check_model(model)
        leaves = resolved_leaves(model, options["leaf_modules"])  # here: none of the layers has been replaced yet
        batches = None
        if calibration is not None:
            batches = read_examples(calibration, "calibration", model)
        if step is not None:
            small = _compile_in_steps(model, step, finetune, options)
        elif finetune is not None:
            raise InputError("finetune is called after each pruning step: give step too, such as step=0.05")
        else:
            small = _compile_at_once(model, options, share, batches, eliminate)
        if batches is not None:
            calibrate_on(model, small, batches, leaves)
        if eliminate:
            remove_unread_filters(small, as_inputs(example_inputs, model), leaves)
    if not inplace:
        return small
    adopt(model, small)
    hand_on_times(small if timing_of(small) is not None else None, model)
    return model


def _asked(ratio: float | None, budget: Asked | None, step: float | None, calibration: Any) -> CheckedBudget:
    """The checked budget, or None where a ratio is given instead."""
    if (ratio is None) == (budget is None):
        raise InputError(
            "give exactly one of ratio (the share of each layer's connections that is pruned) and budget (the share of "
            "the model's MACs or parameters that remains, or milliseconds)"
        )
    if budget is None:
        return None
    if calibration is None:
        raise InputError("budget measures on data what each layer can do without: give calibration too")
    if step is not None:
        raise InputError("step prunes to a ratio: it can't be combined with budget")
    return checked_budget(budget)


def _check_time(example_inputs: object, eliminate: bool) -> None:
    """Refuse what doesn't go with a budget of milliseconds."""
    if example_inputs is None:
        raise InputError("budget['ms'] is the time of a call of the frozen model: give the call's example_inputs too")
    if eliminate:
        raise InputError(
            "eliminate can't be combined with a budget of milliseconds: sgfx.freeze eliminates anyway, and it is timed"
        )


def _compile_at_once(
    model: M, options: dict[str, Any], share: CheckedBudget, batches: list[Arguments] | None, eliminate: bool
) -> M:
    """Plan on the live model, which these passes only read, and lower a copy."""
    settings = checked_settings(model, **options)
    known: Facts = {SETTINGS: settings}
    spending: tuple[Pass, ...] = ()
    if share is not None and batches is not None:
        inputs = settings.example_inputs or batches[0]
        known = {**known, EXAMPLES: batches, BUDGET: budget_of(*share, inputs, eliminating=eliminate)}
        spending = spending_passes(progress_bar)

    def planned() -> tuple[dict[str, LayerPlan], Fit | None]:
        """Graphs and importance vectors, as large as the weights, are gone when this returns."""
        compilation = run_passes(ANALYSIS, Compilation(model, known))
        compilation.take(REGIONS).empty()
        run_passes((*GROUPING, *spending, *PRUNING), compilation)
        fit = compilation[FIT] if spending else None
        return compilation[PLANS], fit

    plans, fit = planned()
    if fit is not None:
        warn_of_fit(fit)
    small = lowered_copy(model, settings, plans)
    hand_on_times(fit.model if fit is not None else None, small)
    return small


def _compile_in_steps(
    model: M, step: float, finetune: Callable[[M, Step], object] | None, options: dict[str, Any]
) -> M:
    pruner = Pruner(model, step=step, **options)
    modes = {path: module.training for path, module in pruner.model.named_modules()}
    for each in pruner:
        if finetune is None:
            continue
        try:
            finetune(pruner.model, each)
        except BaseException as error:
            error.pruner = pruner  # type: ignore[attr-defined]
            error.add_note(
                f"sgfx: finetune failed at step {each.index} of {len(pruner)}. The exception's .pruner holds the "
                "masked model: iterate over it to go on from this step"
            )
            raise
    small = pruner.lower()
    for path, module in small.named_modules():
        module.training = modes.get(path, module.training)  # finetune may have left other modes
    return small
