"""Random numbers that leave the global generators alone.

What this package draws itself comes from generators of its own. Models that it runs and loaders that it reads draw as
they like: in `own_random_state` every operation of torch that draws in this thread does so from generators of ours, and
other threads go on with the global ones. That costs some time at every operation. Where it can't be, the global state
is put back, so that other threads may draw some numbers twice: Python's ``random`` and numpy, ``torch.manual_seed``
inside a forward, and what is timed, takes long or is traced by others (`preserved_random_state`: freezing, distilling,
training, counting, exporting).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def own_random_state() -> Iterator[None]:
    """Let this thread draw from generators of ours, which start anew each time; the global ones stay as they are."""
    seed, before, gpus = torch.initial_seed(), torch.get_rng_state(), _gpu_states()
    with _preserved_elsewhere():
        try:
            with _OwnGenerators():
                yield
        finally:
            fresh = torch.Generator().manual_seed(torch.initial_seed()).get_state()
            again = torch.equal(torch.get_rng_state(), fresh) and not torch.equal(before, fresh)
            if again or torch.initial_seed() != seed:  # code inside has set a seed
                torch.set_rng_state(before)
                for index, state in enumerate(gpus):
                    torch.cuda.set_rng_state(state, index)


def _gpu_states() -> list[Tensor]:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if initialized else []


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global generators of torch (CPU and GPUs), numpy and Python back on leaving, whatever happened inside."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = list(range(torch.cuda.device_count())) if initialized else []
    with _preserved_elsewhere(), torch.random.fork_rng(gpus):
        yield


@contextmanager
def _preserved_elsewhere() -> Iterator[None]:
    """The same for Python and numpy, where something was drawn."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
    finally:
        if random.getstate() != python:
            random.setstate(python)
        if not _are_equal(np.random.get_state(legacy=False), numpy):
            np.random.set_state(numpy)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two states are the same: dicts of dicts, arrays and numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other))


def seed_all(seed: int) -> None:
    """Seed the global generators, so that runs of two models draw the same numbers; within `preserved_random_state`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _OwnGenerators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives a generator to every operation of this thread that draws from one."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, with a generator if it draws."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) or _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        seeded = _with_generator(func)
        if seeded is not None:
            given = _value(func, "generator", args, kwargs)
            return seeded(*args, **{**kwargs, "generator": self._generator(device)} if given is None else kwargs)
        with self:  # an operation that is made of others
            made = func.decompose(*args, **kwargs)
        return self._swapped(device, func, args, kwargs) if made is NotImplemented else made

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]

    def _swapped(self, device: torch.device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation that takes no generator, with the state of ours in the global one as long as it lasts."""
        own, index = self._generator(device), device.index or 0
        shared = torch.cuda.default_generators[index] if device.type == "cuda" else torch.default_generator
        before = shared.get_state()
        shared.set_state(own.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            own.set_state(shared.get_state())
            shared.set_state(before)


@cache
def _with_generator(func: Any) -> Any:
    """The overload of an operation that takes a generator, or None."""
    packet = func.overloadpacket
    for other in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in other._schema.arguments]
        if "generator" in names and _without_generator(other) == _without_generator(func):
            return other
    return None


def _without_generator(func: Any) -> list[tuple[str, str]]:
    return [(each.name, str(each.type)) for each in func._schema.arguments if each.name != "generator"]


def _value(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation is given for an argument, or None."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return given.get(name)


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether dropout inside a larger operation is off."""
    return any(_value(func, name, args, kwargs) == 0 for name in ("dropout_p", "dropout"))


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensor = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    device = kwargs.get("device") or (torch.device("cpu") if tensor is None else tensor.device)
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found
