"""What is asked of freezing, as facts at its start: the model, and who decides how layers are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from passes.errors import InputError
from passes.freezing.choosing.decisions import Decisions, LayerDecision
from passes.infra.compilation import Fact

STRATEGIES = ("library", "kernel")


@dataclass(frozen=True)
class Asked:
    """Who decides how layers are run.

    Attributes:
        strategy: ``"library"`` or ``"kernel"`` for all layers, or None.
        given: decisions that were made before, or None to measure.
        insisted: whether the caller gave them; those that came with the model are taken for the same layers alone.
        machine: what it is measured on.
        note: what is worth knowing about the choice already, or "".
    """

    strategy: str | None
    given: Decisions | None
    insisted: bool
    machine: str
    note: str = ""

    def fitting(self, works: Mapping[str, LayerDecision]) -> Decisions | None:
        """The decisions to take for layers that have such work, None to measure."""
        if self.given is None or self.insisted:
            return self.given
        layers = self.given.layers
        fits = all(path in layers and layers[path].is_alike(work) for path, work in works.items())
        return self.given if fits else None

    def check_names(self, layers: Mapping[str, LayerDecision]) -> None:
        """Refuse decisions of another model, as far as their names tell; `layers` is what was decided."""
        given = self.given.layers if self.given is not None and self.insisted else {}
        unknown = next((path for path in given if path not in layers), None)
        if unknown is not None:
            raise InputError(f"the decisions are of another model: this one has no layer {unknown!r} to decide about")


ORIGINAL = Fact[nn.Module]("original")  # the model that is frozen: neither run nor changed
ASKED = Fact[Asked]("asked")


def checked_strategy(strategy: object) -> str | None:
    """Check the strategy that a user forces."""
    if strategy is not None and strategy not in STRATEGIES:
        raise InputError(f"strategy must be {' or '.join(map(repr, STRATEGIES))} or None, not {strategy!r}")
    return None if strategy is None else str(strategy)
