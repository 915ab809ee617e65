"""`sgfx.calibrate`: make good in closed form what compression has lost, on unlabelled data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.calibration import calibrate_region
from passes.copying import copy_inputs, shadow, unhooked_copy
from passes.cut import cuts
from passes.errors import InputError
from passes.examples import read_examples
from passes.facts import Region
from passes.layers.grouped import Grouped
from passes.plan import layer_shape, plans
from passes.random_state import preserved_random_state
from passes.regions import find_regions
from passes.settings import check_model
from passes.trace import join

M = TypeVar("M", bound=nn.Module)
Arguments = tuple[Any, ...]


def calibrate(dense: nn.Module, small: M, data: Any) -> M:
    """Re-solve the kept weights of a compressed model in closed form, layer by layer, towards the dense model.

    No labels and no training. Changed are the weights and biases of regrouped layers, and the running mean of the norm
    behind a layer without a bias. Both models are run in eval mode, on copies without hooks. Layers that can't be
    reached keep their weights, and a warning names them.

    Args:
        dense: the model before `sgfx.compile`; it is not changed.
        small: what `sgfx.compile` or `Pruner.lower` made of it, changed in place once everything has succeeded.
        data: a tensor ``[N, …]`` of examples, or an iterable of batches, read once; a batch is a tensor, or a tuple or
            list whose first element is the input. A few hundred examples from the training data are enough.

    Returns:
        `small`.

    Raises:
        InputError: (a ValueError) the data are empty, hold NaN or do not fit, or `small` is no compiled form of
            `dense`. Nothing is changed then.
        TypeError: an argument is of the wrong type.
    """
    check_compiled(dense, small)
    return calibrate_on(dense, small, on_device(read_examples(data, "data"), small))


def calibrate_on(dense: nn.Module, small: M, batches: list[Any], leaves: Collection[str] = ()) -> M:
    """The same for a `small` that is known to fit, on inputs that were read already.

    `leaves` are the paths of modules that are not to be traced into.
    """
    work = unhooked_copy(small)  # all graphs that are made of it share its parameters
    with preserved_random_state():
        changed = _calibrated(shadow(dense).eval(), work.eval(), batches, leaves)
    tensors = dict([*small.named_parameters(), *small.named_buffers()])
    with torch.no_grad():
        for name, value in changed.items():
            tensors[name].copy_(value)
    _warn_of_the_rest(small, changed)
    return small


def check_compiled(dense: nn.Module, small: nn.Module) -> None:
    """Refuse a `small` that is not a compiled form of `dense`."""
    check_model(dense)
    check_model(small)
    modules = dict(dense.named_modules())
    found = plans(small)
    if not any(isinstance(module, Grouped) for module in small.modules()):
        raise InputError("small has no regrouped layers: it must be what sgfx.compile or Pruner.lower returned")
    if cuts(small):
        raise InputError("filters have been eliminated from small: give the data to sgfx.compile(…, calibration=data)")
    for path, plan in found.items():
        if path not in modules or not hasattr(modules[path], "weight") or layer_shape(modules[path]) != plan.shape:
            raise InputError(f"small is no compiled form of dense: layer {path!r} of small is not in dense, or differs")


def on_device(batches: list[Any], model: nn.Module) -> list[Any]:
    """Move the inputs of all batches to the device of the model."""
    device = next(model.parameters()).device
    return [pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch) for batch in batches]


def _calibrated(dense: nn.Module, work: nn.Module, batches: list[Any], leaves: Collection[str]) -> dict[str, Tensor]:
    """Calibrate `work`, region by region in the order in which they run; returns what has changed."""
    changed: dict[str, Tensor] = {}
    for path, theirs, mine, pairs in walkable_regions(dense, work, batches, leaves):
        for name, value in calibrate_region(theirs, mine, pairs).items():
            changed[join(path, name)] = value
            holder, _, leaf = join(path, name).rpartition(".")
            getattr(work.get_submodule(holder), leaf).detach().copy_(value)  # the graphs' buffers are copies
    return changed


def walkable_regions(
    dense: nn.Module, work: nn.Module, batches: list[Any], leaves: Collection[str]
) -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule, list[tuple[Arguments, Arguments]]]]:
    """The traced parts that both models have, in the order in which they run.

    Yields:
        The path, both eval graphs, and for each batch the arguments of both. Those of `work` are taken when its turn
        has come, so that they show what has been changed before.
    """
    parts = _regions(dense, batches[0], leaves)
    twins = {region.path: region for region in _regions(work, batches[0], leaves)}
    for region in _in_order(dense, [region for region in parts if region.path in twins], batches[0]):
        theirs, mine = (_arguments(model, region.path, batches) for model in (dense, work))
        # Where the models differ in what they find (the proposals of a detector), both are given the dense one's.
        pairs = (
            [(a, b) for a, b in zip(theirs, mine, strict=True)] if _alike(theirs, mine) else [(a, a) for a in theirs]
        )
        yield region.path, region.graphs["eval"], twins[region.path].graphs["eval"], pairs


def _regions(model: nn.Module, example: Any, leaves: Collection[str]) -> tuple[Region, ...]:
    """The regions of a model; the example is only run where it can't be traced whole."""
    parts = find_regions(model, leaf_modules=leaves).parts
    whole = [region.path for region in parts] == [""]
    return parts if whole else find_regions(model, (example,), leaves).parts


def _in_order(model: nn.Module, regions: list[Region], example: Any) -> list[Region]:
    """`regions` in the order in which they are called; those that are not called are left out."""
    if [region.path for region in regions] == [""]:
        return regions
    called: list[str] = []
    with _tapped(model, [region.path for region in regions], lambda path, _: called.append(path)), torch.no_grad():
        model(copy_inputs(example))
    return sorted((region for region in regions if region.path in called), key=lambda region: called.index(region.path))


def _arguments(model: nn.Module, path: str, batches: list[Any]) -> list[Arguments]:
    """The positional arguments of every call of the submodule at `path`, over all batches."""
    if not path:
        return [(batch,) for batch in batches]
    given: list[Arguments] = []
    with _tapped(model, [path], lambda _, args: given.append(args)), torch.no_grad():
        for batch in batches:
            model(copy_inputs(batch))
    return given


@contextmanager
def _tapped(model: nn.Module, paths: list[str], note: Callable[[str, Arguments], object]) -> Iterator[None]:
    """Call ``note(path, arguments)`` whenever the submodule at one of `paths` is called."""

    def hook_for(path: str) -> Callable[[nn.Module, Arguments], None]:
        return lambda _, args: (note(path, args), None)[1]

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alike(a: list[Arguments], b: list[Arguments]) -> bool:
    """Whether two lists of arguments have the same structure and shapes."""
    (left, one), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    shapes = [[x.shape if isinstance(x, Tensor) else x for x in side] for side in (left, right)]
    return one == other and shapes[0] == shapes[1]


def _warn_of_the_rest(small: nn.Module, changed: dict[str, Tensor]) -> None:
    left = [
        path
        for path, module in small.named_modules()
        if isinstance(module, Grouped) and f"{path}.weight" not in changed
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(
            f"not calibrated, since no traced part of the model calls them in eval mode: {', '.join(left[:5])}{more}",
            stacklevel=4,
        )
