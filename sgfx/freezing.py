"""`sgfx.freeze`: the inference form of a model, dense or compiled: folded, fused, each layer run in its fastest way."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn.modules.conv import _ConvNd

from passes.copying import copy_inputs
from passes.errors import InputError
from passes.freezing.assemble import Part, assembled, fused_parts, without_unread_filters
from passes.freezing.checking import check
from passes.freezing.choosing import checked_strategy, chosen_layers, layer_sizes
from passes.freezing.decisions import Decisions, attach_decisions, decisions_of, machine
from passes.freezing.hooks import check_hooks
from passes.random_state import preserved_random_state
from passes.settings import as_inputs, check_model


def freeze(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    *,
    strategy: str | None = None,
    decisions: Decisions | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make the inference form of a model: the outputs of its eval mode, as fast as this machine computes them.

    Filters that nobody reads are removed, norms, sums and activations are fused into the layers before them, and each
    layer is run in the way that is measured to be fastest: by the library, or by a kernel that reads the inputs of a
    group where they lie. What was chosen stands in ``decisions`` of the result, and stays with `model`, so that
    `sgfx.save` keeps it. Inputs of other sizes work too.

    Args:
        model: a dense or a compiled model; it is neither run nor changed (but for the decisions, which stay with it).
        example_inputs: a tensor or a tuple of positional arguments, of the shape that will be asked for most.
        strategy: None to measure; ``"library"`` or ``"kernel"`` to force one.
        decisions: those of an earlier result (or their ``to_dict()``), so that nothing is measured. They hold for the
            kind of machine and the number of threads that they were made on; elsewhere a warning says that they don't.

    Returns:
        A ``torch.fx.GraphModule`` in eval mode, or, where a model can't be traced whole, a copy of it in which each
        traceable part is one. It has no hooks and no trainable parameters. To see whether the model's hooks change what
        it computes, copies of them are run once, on a copy of the model.

    Raises:
        InputError: (a ValueError) the model, the inputs, the strategy or the decisions do not fit, a hook changes what
            the model computes, or the frozen form
            computes something else than the eval form for the example inputs: it is compared before it is returned.
    """
    check_model(model)
    if frozen_before := next(iter(chosen_layers(model)), None):
        raise InputError(f"the model is frozen already, at {frozen_before!r}: freeze the one that it was made from")
    inputs: tuple[object, ...] = copy_inputs(as_inputs(example_inputs) or ())
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
    with preserved_random_state():
        small = without_unread_filters(model, inputs)
        parts = fused_parts(small, inputs)
        if decisions is None and given is not None and not _fits(given, parts):
            given = None
        measured = strategy is None and given is None
        twins = [[part.twin() for part in parts] for _ in range(2)] if measured else []
        frozen, layers = assembled(small, parts, strategy, given.layers if given is not None else {})
        made = Decisions(machine(), layers)
        if decisions is not None and given is not None:
            _check_names(given, made)
        if measured:
            frozen, made = _fastest(small, frozen, made, twins, inputs)
        doubt = check(frozen, model, made.layers, inputs)
    made = replace(made, note="; ".join(filter(None, (made.note or note, doubt))))
    if measured:
        attach_decisions(model, made)
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
    """Whether decisions that came with the model were made for these layers, as they are now, at these sizes."""
    sizes = {path: size for part in parts for path, size in layer_sizes(part.graph).items()}
    known = {path: (layer.macs, layer.shape) for path, layer in given.layers.items()}
    return all(known.get(path) == size for path, size in sizes.items())


def _check_names(given: Decisions, made: Decisions) -> None:
    """Refuse decisions of another model, as far as their names tell."""
    unknown = next((path for path in given.layers if path not in made.layers), None)
    if unknown is not None:
        raise InputError(f"the decisions are of another model: this one has no layer {unknown!r} to decide about")


def _fastest(
    small: nn.Module, frozen: nn.Module, made: Decisions, twins: list[list[Part]], inputs: tuple[object, ...]
) -> tuple[nn.Module, Decisions]:
    """The fastest form of the whole, by the median over interleaved calls: as chosen, dense, or the library alone.

    Dense is what `freeze` would choose for the dense network, but for filters that nobody reads here. `twins` are the
    parts anew, as often as there are other forms.
    """
    forms = {"chosen": (frozen, made.layers, "")}
    ungrouped = {path: layer.without_groups() for path, layer in made.layers.items()}
    if ungrouped != made.layers:
        dense, _ = assembled(small, twins.pop(), None, ungrouped)
        forms["dense"] = dense, ungrouped, "regrouping is not faster here: each layer is run with its dense weight"
    library = {path: replace(d, way="library", tiling=()) for path, d in made.layers.items()}
    note = "the library alone is faster than what was chosen layer by layer: its form is returned"
    forms["library alone"] = assembled(small, twins.pop(), "library", {})[0], library, note
    times = _interleaved({name: form for name, (form, _, _) in forms.items()}, inputs)
    best = min(times, key=times.__getitem__)
    form, layers, note = forms[best]
    return form, Decisions(made.machine, layers, times, note)


def _interleaved(forms: Mapping[str, nn.Module], inputs: tuple[object, ...]) -> dict[str, float]:
    """Median milliseconds of a call of each form, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for index in range(7):
            for name, form in forms.items():
                start = time.perf_counter()
                form(*inputs)
                if index:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}
