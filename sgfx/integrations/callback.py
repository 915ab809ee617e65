"""What the callbacks of all libraries share: prune, lower and go on, at the moments of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from passes.errors import InputError
from passes.options import Criterion, ExampleInputs, LeafModules
from sgfx.integrations.in_place import LivePruner
from sgfx.integrations.schedule import Moments, When


class ScheduledPruning:
    """Prunes the model of a run in place, step by step, and lowers it.

    Moments are counted as the library does, from 0: a pruning step happens before the first batch of that epoch, or
    before the batch behind so many optimizer steps.

    Args:
        ratio, step, groups, linear_ratio, ignore, overrides, criterion, example_inputs, seed, leaf_modules: as those of
            `sgfx.Pruner`.
        every_epochs: so many epochs between two pruning steps, the first at once; or a list of the epochs.
        every_steps: the same in optimizer steps. Exactly one of the two.
        lower_at: when the model is lowered, in the same unit; None: with the last pruning step. Lowering is exact: it
            changes neither outputs nor training, but for rounding.
        module: path of the network in the model that is trained; ``""``: all of it.

    Raises:
        InputError: the moments are no moments.
        TypeError: a moment is no integer.
    """

    def __init__(
        self,
        *,
        ratio: float,
        step: float,
        every_epochs: int | Sequence[int] | None = None,
        every_steps: int | Sequence[int] | None = None,
        lower_at: int | None = None,
        module: str = "",
        groups: int = 8,
        linear_ratio: float | None = None,
        ignore: str | nn.Module | Iterable[str | nn.Module] = (),
        overrides: Mapping[str, Mapping[str, float]] | None = None,
        criterion: Criterion = "l1",
        example_inputs: ExampleInputs | None = None,
        seed: int = 0,
        leaf_modules: LeafModules = (),
    ) -> None:
        """Keep what was asked for. The model's side of it is checked when the run begins."""
        self._when = When.of(every_epochs, every_steps, lower_at)
        self._module = module
        self._options: dict[str, Any] = {
            "ratio": ratio,
            "step": step,
            "groups": groups,
            "linear_ratio": linear_ratio,
            "ignore": ignore,
            "overrides": overrides,
            "criterion": criterion,
            "example_inputs": example_inputs,
            "seed": seed,
            "leaf_modules": leaf_modules,
        }
        self._pruner: LivePruner[nn.Module] | None = None
        self._moments: Moments | None = None
        self._compared = False  # whether the first batch of this run has been seen

    @property
    def lowered(self) -> bool:
        """Whether the model is lowered."""
        return self._pruner is not None and self._pruner.lowered

    def _attach(self, model: nn.Module) -> None:
        """Put masked layers into the network of `model`, unless this callback did so before."""
        try:
            network = model.get_submodule(self._module)
        except AttributeError as error:
            raise InputError(f"{type(model).__name__} has no module {self._module!r}: {error}") from error
        if "_compiled_call_impl" in network.__dict__ and network._compiled_call_impl is not None:
            raise InputError("the model is compiled by torch: prune first, and compile the lowered model")
        self._compared = self.lowered  # in a second fit, which counts from 0 again
        if self._pruner is not None and self._pruner.model is network:
            return
        self._compared = False
        self._pruner = LivePruner(network, **self._options)
        self._moments = self._when.moments(len(self._pruner))

    def _begin(self, end: float | None) -> None:
        """Say so where a run that ends at `end`, in the moments' unit, is over before the model is lowered."""
        if end is not None and not self.lowered and self._state()[1].lower >= end:
            warnings.warn(f"the run ends after {end:g} {self._when.unit}, {self._unfinished()}", stacklevel=2)

    def _continue(self, now: int, optimizers: Iterable[Optimizer]) -> None:
        """Do what is due at `now`."""
        pruner, moments = self._state()
        if not self._compared:
            self._compare(now)
            self._compared = True
        if pruner.lowered:
            return
        while pruner.index < moments.before(now)[1]:
            pruner.advance()
        if moments.lower <= now:
            pruner.lower_for(optimizers)

    def _finish(self) -> None:
        if not self.lowered:
            warnings.warn(f"the run is over, {self._unfinished()}", stacklevel=2)

    def _compare(self, now: int) -> None:
        """Hold the model, which a checkpoint may have filled, to the moments."""
        pruner, moments = self._state()
        least, most = moments.before(now)
        if not least <= pruner.index <= most or (moments.lower > now if pruner.lowered else moments.lower < now):
            raise InputError(
                f"the run goes on at {now} {moments.unit} with a model of pruning step {pruner.index}"
                f"{', lowered' if pruner.lowered else ''}, where these moments make step {most}: give the callback the "
                "moments that the checkpoint was made with, and resume model and trainer from the same checkpoint"
            )

    def _unfinished(self) -> str:
        pruner, moments = self._state()
        return (
            f"before the pruning is complete: the model stands at step {pruner.index} of {len(pruner)}, and is lowered "
            f"at {moments.lower} {moments.unit}. Train longer, or go on from a checkpoint"
        )

    def _state(self) -> tuple[LivePruner[nn.Module], Moments]:
        if self._pruner is None or self._moments is None:
            raise InputError("the callback has not seen the model yet: give it to the trainer when that is made")
        return self._pruner, self._moments
