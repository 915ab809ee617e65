"""Pairing: the traced parts of a dense and a compressed model in the order in which they run, and what calls them.

1. A model that is traced whole is called with the batches themselves.
2. The arguments of a part are taken from runs of both models, the compressed one's when its turn has come, so that they
   show what has been changed before. They are kept up to `LIMIT` bytes; beyond it the models are run again.
3. Where the calls of the two models differ in number or shape, or one has chosen data by their value before
   (`value_choices.py`; the proposals of a detector), rows would not belong together: both are given the dense model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.calibration.data import Arguments, single_image
from passes.calibration.paired_walk import Pair
from passes.calibration.splitting import split
from passes.calibration.value_choices import WatchForChoices
from passes.errors import InputError, let_memory_errors_pass
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.values import leaves, shapes_of, tensors_in
from passes.options.arguments import call_model
from passes.tracing.regions import find_regions
from passes.tracing.trace import Region

LIMIT = 1 << 29  # bytes of arguments that are kept
Calls = list[tuple[Arguments, bool]]  # of one run: the arguments of each call, and whether data were chosen before


def walkable_regions(
    dense: nn.Module, work: nn.Module, batches: list[Arguments], leaves: Collection[str]
) -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule, Sequence[Pair]]]:
    """The traced parts that both models have, in the order in which they run.

    Args:
        dense: the dense model; a copy without hooks is run.
        work: a compressed form of it, in eval mode, without hooks; its part may be changed before the next is asked
            for.
        batches: the arguments of the models.
        leaves: paths of modules that are not to be traced into.

    Yields:
        The path, both eval graphs, and the arguments of every call for both.
    """
    parts = _regions(dense, batches[0], leaves)
    _mark_shared(parts)
    twins = {region.path: region for region in _regions(work, batches[0], leaves)}
    regions = [region for region in parts if region.path in twins]
    quiet = None if [region.path for region in regions] == [""] else unhooked_copy(dense).eval()
    for region in regions if quiet is None else _in_order(quiet, regions, batches[0]):
        pairs = [(each, each) for each in batches] if quiet is None else _Pairs((quiet, work), region.path, batches)
        theirs, mine = region.graphs["eval"], twins[region.path].graphs["eval"]
        split(theirs, mine, work.get_submodule(region.path))
        yield region.path, theirs, mine, pairs


def _regions(model: nn.Module, example: Arguments, leaves: Collection[str]) -> tuple[Region, ...]:
    """The regions of a model; the example is only run where it can't be traced whole."""
    parts = find_regions(model, leaf_modules=leaves).parts if len(example) == 1 else ()
    if [region.path for region in parts] == [""]:
        return parts
    try:
        return find_regions(model, example, leaves).parts
    except InputError as error:
        raise InputError(
            f"data of shape {shapes_of(example)} do not fit {type(model).__name__}: {error.__cause__ or error}"
            f"{single_image(example)}"
        ) from error


def _mark_shared(regions: tuple[Region, ...]) -> None:
    """Mark what is read by a module that several parts call: it is not one part's to change."""
    calls = [
        (region, node, region.graphs["eval"].get_submodule(str(node.target)))
        for region in regions
        for node in region.graphs["eval"].graph.nodes
        if node.op == "call_module"
    ]
    for _, node, module in calls:
        if len({region.path for region, _, other in calls if other is module}) > 1:
            for read in node.all_input_nodes:
                read.meta["exposed"] = "a module that several parts call"


def _in_order(model: nn.Module, regions: list[Region], example: Arguments) -> list[Region]:
    """`regions` in the order in which they are called; those that are not called are left out."""
    called: list[str] = []
    with _tapped(model, [region.path for region in regions], lambda path, _: called.append(path)):
        _call(model, example)
    return sorted((region for region in regions if region.path in called), key=lambda region: called.index(region.path))


class _Pairs(Sequence[Pair]):
    """The arguments of every call of the submodule at `path` in both models, over all batches."""

    def __init__(self, models: tuple[nn.Module, nn.Module], path: str, batches: list[Arguments]) -> None:
        self._models, self._path, self._batches = models, path, batches
        self._kept: dict[int, tuple[Calls, Calls]] = {}
        self._places: list[tuple[int, int]] = []  # of each call: its batch, and its number there
        self._alike, free = True, LIMIT
        for number in range(len(batches)):
            both = self._run(number)
            self._alike &= _alike(*both)
            self._places += [(number, call) for call in range(len(both[0]))]
            free -= _nbytes(both)
            if free >= 0:
                self._kept[number] = both

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, call = self._places[index]
        theirs, mine = self._kept.get(number) or self._run(number)
        return theirs[call][0], (mine if self._alike else theirs)[call][0]

    def _run(self, number: int) -> tuple[Calls, Calls]:
        theirs, mine = (_calls(model, self._path, self._batches[number]) for model in self._models)
        return theirs, mine


def _calls(model: nn.Module, path: str, batch: Arguments) -> Calls:
    """Run one batch, and note the calls of the submodule at `path`."""
    found: Calls = []
    watch = WatchForChoices()
    # Copies: the code behind the call may work on the same tensors in place.
    with _tapped(model, [path], lambda _, given: found.append((copy_inputs(given), watch.seen))), watch:
        _call(model, batch)
    return found


def _call(model: nn.Module, batch: Arguments) -> None:
    try:
        with torch.no_grad():
            call_model(model, copy_inputs(batch))
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"data of shape {shapes_of(batch)} do not fit {type(model).__name__}: {error}{single_image(batch)}"
        ) from error


@contextmanager
def _tapped(model: nn.Module, paths: list[str], note: Callable[[str, Arguments], object]) -> Iterator[None]:
    """Call ``note(path, arguments)`` whenever the submodule at one of `paths` is called; all arguments by position."""

    def hook_for(path: str) -> Callable[[nn.Module, Arguments, dict[str, Any]], None]:
        signature = inspect.signature(model.get_submodule(path).forward)

        def hook(module: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> None:
            note(path, signature.bind(*args, **kwargs).args)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_for(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alike(theirs: Calls, mine: Calls) -> bool:
    """Whether the calls of two runs are known to be about the same, row by row."""
    sides = (leaves([given for given, _ in calls]) for calls in (theirs, mine))
    left, right = ([(place, x.shape if isinstance(x, Tensor) else x) for place, x in side] for side in sides)
    return left == right and not any(chosen for _, chosen in theirs + mine)


def _nbytes(value: object) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors_in(value))
