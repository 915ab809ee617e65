"""`sgfx.freeze`: the inference form of a model, dense or compiled: folded, fused, each layer run in its fastest way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from passes import kernel
from passes.errors import InputError
from passes.freezing import (
    ASKED,
    FROZEN,
    ORIGINAL,
    Asked,
    Decisions,
    check_hooks,
    check_weights,
    checked_strategy,
    chosen_layers,
    decisions_of,
    machine,
    quiet_copy,
)
from passes.infra import Compilation, Facts, preserved_random_state, run_passes
from passes.models import copy_inputs
from passes.options import SETTINGS, ExampleInputs, Settings, as_inputs, check_model
from passes.pipeline import freezing
from sgfx.progress import progress_bar


def freeze(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    strategy: str | None = None,
    decisions: Decisions | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Make the inference form of a model: the outputs of its eval mode, as fast as this machine computes them.

    Filters that nobody reads are removed, norms, sums and activations are fused into the layers before them, and each
    layer is run in the way that is measured to be fastest: by the library, or by a kernel that reads the inputs of a
    group where they lie. What was chosen stands in ``decisions`` of the result, and stays with `model`, so that
    `sgfx.save` keeps it; unless the machine was busy, as ``decisions.note`` says then. Inputs of other sizes work too.

    Args:
        model: a dense or a compiled model; it is neither run nor changed (but for the decisions, which stay with it).
        example_inputs: a tensor, a tuple of positional arguments (the last may be a dict of keywords), or such a dict,
            of the shape that will be asked for most.
        strategy: None to measure; ``"library"`` or ``"kernel"`` to force one.
        decisions: those of an earlier result (or their ``to_dict()``), so that nothing is measured. They hold for the
            kind of machine and the number of threads that they were made on; elsewhere a warning says that they don't.
        progress: show a progress bar, on a terminal.

    Returns:
        A ``torch.fx.GraphModule`` in eval mode, or, where a model can't be traced whole, a copy of it in which each
        traceable part is one. It has no hooks and no trainable parameters. To see whether the model's hooks change what
        it computes, copies of them are run once, on a copy of the model.

    Raises:
        InputError: (a ValueError) the model, the inputs, the strategy or the decisions do not fit, a hook changes what
            the model computes, or the frozen form computes something else than the eval form for the example inputs:
            it is compared before it is returned, and the first layer that differs is named.
    """
    check_model(model)
    if frozen_before := next(iter(chosen_layers(model)), None):
        raise InputError(f"the model is frozen already, at {frozen_before!r}: freeze the one that it was made from")
    inputs: tuple[object, ...] = copy_inputs(as_inputs(example_inputs, model) or ())
    if not inputs:
        raise InputError("freeze needs example_inputs, a tensor or a tuple of positional arguments, to measure with")
    check_weights(model)
    with preserved_random_state():
        check_hooks(model, inputs)
    strategy = checked_strategy(strategy)
    if strategy is not None and decisions is not None:
        raise InputError("strategy forces one way for all layers, decisions say one for each: give only one of them")
    note = "" if strategy == "library" else _note_without_kernel(strategy)
    given = None if strategy is not None else _given(model, decisions)
    asked = Asked(strategy, given, decisions is not None, machine(), note)
    with preserved_random_state():
        known: Facts = {SETTINGS: Settings(example_inputs=inputs), ORIGINAL: model, ASKED: asked}
        compilation = Compilation(quiet_copy(model), known)
        run_passes(freezing(partial(progress_bar, shown=progress)), compilation)
    return compilation[FROZEN]


def _given(model: nn.Module, decisions: Decisions | Mapping[str, Any] | None) -> Decisions | None:
    """Decisions to take: the caller's, or those that came with the model, if they were made on such a machine."""
    if isinstance(decisions, Mapping):
        decisions = Decisions.from_dict(decisions)
    if decisions is not None and not isinstance(decisions, Decisions):
        raise TypeError(
            f"decisions must be those of a frozen model, or their to_dict(), not {type(decisions).__name__}"
        )
    found = decisions or decisions_of(model)
    if found is None or found.machine == machine():
        return found
    if decisions is not None:
        warnings.warn(
            f"freeze measures anew: the decisions were made on {found.machine!r}, and this is {machine()!r}",
            stacklevel=3,
        )
    return None


def _note_without_kernel(strategy: str | None) -> str:
    """Why the kernel can't be used on this machine, with a warning; "" if it can."""
    reason = kernel.supported()
    if reason is None:
        return ""
    if strategy == "kernel":
        raise InputError(f"strategy='kernel' asks for the kernel, which can't run here: {reason}")
    warnings.warn(f"freeze uses the library alone: the kernel can't run here: {reason}", stacklevel=3)
    return f"the kernel can't run here: {reason}"
