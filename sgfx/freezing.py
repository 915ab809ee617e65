"""`sgfx.freeze`: the inference form of a model, dense or compiled: folded, fused, each layer run in its fastest way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.freezing.assemble import Part, rewritten_parts, without_unread_filters
from passes.freezing.candidates import checked_strategy, chosen_layers, layer_works
from passes.freezing.checking import check
from passes.freezing.decisions import Decisions, LayerDecision, attach_decisions, decisions_of, machine
from passes.freezing.forms import fastest_form, form_as_told
from passes.freezing.hooks import check_hooks
from passes.freezing.stopwatch import Stopwatch
from passes.infra.random_state import preserved_random_state
from passes.models.copying import copy_inputs
from passes.options.arguments import ExampleInputs, as_inputs
from passes.options.checks import check_model
from passes.pipeline import REWRITES
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
    _check_weights(model)
    with preserved_random_state():
        check_hooks(model, inputs)
    strategy = checked_strategy(strategy)
    if strategy is not None and decisions is not None:
        raise InputError("strategy forces one way for all layers, decisions say one for each: give only one of them")
    note = "" if strategy == "library" else _note_without_kernel(strategy)
    given = None if strategy is not None else _given(model, decisions)
    stopwatch = Stopwatch()
    with preserved_random_state():
        small = without_unread_filters(model, inputs)
        parts = rewritten_parts(small, inputs, REWRITES)
        if decisions is None and given is not None and not _fits(given, parts):
            given = None
        layers = sum(len(layer_works(part.graph)) for part in parts)
        with progress_bar("freeze", layers, "layer", shown=progress) as step:
            if strategy is None and given is None:
                form = fastest_form(small, parts, inputs, stopwatch, step)
            else:
                form = form_as_told(small, parts, strategy, given, stopwatch, step)
        if decisions is not None and given is not None:
            _check_names(given, form.layers)
        doubt = check(form.model, model, form.layers, inputs, REWRITES)
    notes = dict.fromkeys((note, *form.note.split("; "), stopwatch.complaint(), doubt))
    unfused = {name: reason for part in parts for name, reason in part.unfused.items()}
    made = Decisions(machine(), form.layers, form.milliseconds, "; ".join(filter(None, notes)), unfused)
    if strategy is None and given is None and not stopwatch.is_noisy:
        attach_decisions(model, made)
    frozen = form.model
    frozen.decisions = made  # type: ignore[assignment]
    if isinstance(frozen, fx.GraphModule):
        frozen.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {"decisions": made}  # which copies of it keep
    return frozen


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
    from passes.kernel import supported

    reason = supported()
    if reason is None:
        return ""
    if strategy == "kernel":
        raise InputError(f"strategy='kernel' asks for the kernel, which can't run here: {reason}")
    warnings.warn(f"freeze uses the library alone: the kernel can't run here: {reason}", stacklevel=3)
    return f"the kernel can't run here: {reason}"


def _check_weights(model: nn.Module) -> None:
    """Refuse layers whose weight is computed by a hook: it may be stale now, and a frozen model has no hooks."""
    for path, module in model.named_modules():
        parametrized, layer = hasattr(module, "parametrizations"), isinstance(module, _ConvNd | nn.Linear)
        computing = any(
            type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values()
        )
        if computing or (layer and "weight" not in module._parameters and not parametrized):
            raise InputError(
                f"the weight of layer {path!r} is computed by a hook (weight_norm, spectral_norm, prune): make it a "
                "plain parameter first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
            )


def _fits(given: Decisions, parts: Sequence[Part]) -> bool:
    """Whether decisions that came with the model were made for its layers as they are now, and for such inputs."""
    works = {path: work for part in parts for path, work in layer_works(part.graph).items()}
    return all(path in given.layers and given.layers[path].is_alike(work) for path, work in works.items())


def _check_names(given: Decisions, layers: Mapping[str, LayerDecision]) -> None:
    """Refuse decisions of another model, as far as their names tell."""
    unknown = next((path for path in given.layers if path not in layers), None)
    if unknown is not None:
        raise InputError(f"the decisions are of another model: this one has no layer {unknown!r} to decide about")
