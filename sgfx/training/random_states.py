"""Random states as plain data: of the global generators, and of those that data have of their own."""

from __future__ import annotations

import random
import types
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from passes.infra import preserved_random_state, seed_all

Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class HostState(NamedTuple):
    """States of the three generators."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PLAIN = (str, bytes, int, float, bool, complex, type(None), Tensor, np.ndarray, nn.Module, type, types.ModuleType)
DEPTH = 6  # from a loader over its dataset's transforms to a generator that one of them has
FEW = 64  # entries of a list that may be transforms; datasets are longer


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seed the global generators for an epoch (from 1) in a process (from 0), whatever was drawn before."""
    seed_all(epoch_seed(seed, epoch, 1 + process))


def epoch_seed(seed: int, epoch: int, stream: int = 0) -> int:
    """A seed for one of several streams of an epoch; none of them tells of another.

    Stream 0 is the order of the data, which all processes share; ``1 + process`` is what training draws, and
    ``-1 - process`` what reading the data draws.
    """
    return int(np.random.SeedSequence((seed, epoch, 2 * abs(stream) + (stream < 0))).generate_state(1)[0])


def host_state() -> HostState:
    """The states of Python's, numpy's and torch's global generators on the CPU."""
    return HostState(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())


def set_host_state(state: HostState) -> None:
    """Put back what `host_state` gave."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)


def seeded_state(seed: int) -> HostState:
    """What seeding the global generators would make of them; they stay as they are."""
    with preserved_random_state():
        seed_all(seed)
        return host_state()


def global_state() -> dict[str, Any]:
    """The states of the global generators, GPUs included, as plain data."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    host = host_state()
    gpus = torch.cuda.get_rng_state_all() if initialized else []
    return {"python": host.python, "numpy": _plain(host.numpy), "torch": host.torch, "cuda": gpus}


def set_global_state(state: dict[str, Any]) -> None:
    """Put back what `global_state` gave."""
    set_host_state(HostState(state["python"], _arrays(state["numpy"]), state["torch"]))
    for index, each in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(each, index)


def generators_in(data: object) -> dict[str, Generator]:
    """The generators that data hold, by their paths: a loader's, its samplers', its dataset's and transforms'."""
    found: dict[str, Generator] = {}
    _search(data, "", DEPTH, found, set())
    return found


def states_of(generators: dict[str, Generator]) -> dict[str, Any]:
    """Their states as plain data."""
    return {path: _state_of(generator) for path, generator in generators.items()}


def set_states(generators: dict[str, Generator], states: dict[str, Any]) -> None:
    """Put back what `states_of` gave."""
    for path, state in states.items():
        generator = generators[path]
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            generator.setstate(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = _arrays(state)
        else:
            generator.set_state(_arrays(state))


def _search(value: object, path: str, depth: int, found: dict[str, Generator], seen: set[int]) -> None:
    if isinstance(value, _PLAIN) or id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, _GENERATORS):
        found[path] = value
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value if len(value) <= FEW else ()):
            _search(each, f"{path}[{index}]", depth - 1, found, seen)
    else:
        for name, each in getattr(value, "__dict__", {}).items():
            if not (isinstance(value, DataLoader) and name == "_iterator"):
                _search(each, f"{path}.{name}", depth - 1, found, seen)


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def _plain(value: Any) -> Any:
    """Nested dicts with arrays of integers as lists; numpy's own numbers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    return {key: _arrays(each) for key, each in value.items()}
