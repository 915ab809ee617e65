"""Data as a run reads them: the part of this process, on its device, in an order that can be gone on with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from passes.errors import InputError
from sgfx.training.random_states import (
    epoch_seed,
    generators_in,
    host_state,
    seeded_state,
    set_host_state,
    set_states,
    states_of,
)
from sgfx.training.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

Data: TypeAlias = Iterable[Any]  # of batches, checked as they come


def checked_data(data: Data, name: str) -> Data:
    """Return data that can be iterated once per epoch.

    Raises:
        InputError: they run dry after one.
        TypeError: they are no iterable of batches.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches (inputs, targets), such as a DataLoader, not {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise InputError(
            f"{name} is a {type(data).__name__}, which runs dry after one epoch; pass a DataLoader or a list of batches"
        )
    return data


class Source:
    """The batches of one process.

    The random order of a DataLoader without a generator of its own comes from one of ours, the same in all processes;
    it is lent for as long as the source is open.

    Args:
        data: the user's.
        name: ``"train_data"`` or ``"val_data"``.
        task: takes batches apart.
        accelerator: knows the device and the other processes.
        seed: of the order.
        shown: whether there is a progress bar.

    Attributes:
        is_loader: whether they are a DataLoader, and can be gone on with in the middle of an epoch.

    Raises:
        InputError: there are several processes, and `data` are no DataLoader that could be divided among them, or one
            that divides itself.
    """

    def __init__(self, data: Data, name: str, task: Task, accelerator: Accelerator, *, seed: int, shown: bool) -> None:
        """Divide the data; see the class."""
        self.name = name
        self.is_loader = isinstance(data, DataLoader)
        self._task, self._accelerator, self._seed, self._shown = task, accelerator, seed, shown
        self._lent = ExitStack()
        self._generators = generators_in(data)
        self._order = self._lent.enter_context(_lent_generator(data))
        self._data = data
        if accelerator.num_processes > 1:
            if not isinstance(data, DataLoader):
                raise InputError(
                    f"{name} is a {type(data).__name__}: with several processes it must be a DataLoader, which is "
                    "divided among them"
                )
            if isinstance(data.sampler, DistributedSampler):
                raise InputError(
                    f"the DistributedSampler of {name} would divide what is divided among processes here: leave it out"
                )
            self._data = accelerator.prepare_data_loader(data)

    def close(self) -> None:
        """Give the data back as they were."""
        self._lent.close()

    def __len__(self) -> int:
        """Batches per epoch, or 0 where that isn't known."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def states(self) -> dict[str, Any]:
        """The states of the generators that the data have of their own; to be taken before an epoch."""
        return states_of(self._generators)

    def set_states(self, states: dict[str, Any]) -> None:
        """Put them back.

        Raises:
            InputError: the data have other generators.
        """
        if states.keys() != self._generators.keys():
            raise InputError(
                f"{self.name} had generators {sorted(states)} when the checkpoint was made, and has "
                f"{sorted(self._generators)} now: pass the same kind of data"
            )
        set_states(self._generators, states)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Any, Any]]:
        """Number, check and move the batches of an epoch (from 1), after reading and dropping the first `skip`."""
        from accelerate.utils import send_to_device

        device, step = self._accelerator.device, 0
        shown = self._shown and self._accelerator.is_main_process
        self._order.manual_seed(epoch_seed(self._seed, epoch))
        _tell_epoch(self._data, epoch - 1)
        read = _apart(self._data, epoch_seed(self._seed, epoch, -1 - self._accelerator.process_index))
        length = len(self) or None
        with tqdm(read, desc=self.name, unit="batch", total=length, leave=False, disable=not shown) as bar:
            for step, batch in enumerate(bar, 1):
                if step > skip:
                    inputs, targets = self._task.read(batch, self.name, f"batch {step} of epoch {epoch}")
                    # From pinned memory it comes while the last batch is still computed.
                    yield step, *send_to_device((inputs, targets), device, non_blocking=device.type == "cuda")
        if step < max(skip, 1):
            raise InputError(
                f"{self.name} gave {step or 'no'} batches in epoch {epoch}: it is iterated once per epoch and must "
                "give the batches of (inputs, targets) anew each time; pass a DataLoader or a list (is the dataset "
                "empty, or drop_last on?)"
            )


@contextmanager
def _lent_generator(data: object) -> Iterator[torch.Generator]:
    """Lend a generator to the samplers of a loader that draw from the global one."""
    generator, lent = torch.Generator(), list[Any]()
    batch_sampler = getattr(data, "batch_sampler", None) if isinstance(data, DataLoader) else None
    sampler: Any
    for sampler in (getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(data, DataLoader) and getattr(sampler, "generator", generator) is None:
            sampler.generator = generator
            lent.append(sampler)
    try:
        yield generator
    finally:
        for sampler in lent:
            sampler.generator = None


def _apart(data: Data, seed: int) -> Iterator[Any]:
    """Iterate data with random numbers of their own, whatever is drawn between two batches: they can be read again."""
    own = seeded_state(seed)
    iterator: Iterator[Any] | None = None
    while True:
        outside = host_state()
        set_host_state(own)
        try:
            iterator = iter(data) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            own = host_state()
            set_host_state(outside)
        yield batch


def _tell_epoch(data: Any, epoch: int) -> None:
    """Call ``set_epoch`` of whatever has it, as samplers and datasets do whose order depends on the epoch."""
    parts = [data]
    if isinstance(data, DataLoader) and not hasattr(data, "set_epoch"):  # accelerate's tells its parts itself
        parts = [data.sampler, data.batch_sampler, data.dataset]
    for part in {id(part): part for part in parts}.values():
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(epoch)
