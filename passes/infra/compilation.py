"""A compilation, which passes work on one after the other, the facts that they hand on, and what a pass is.

A fact is something known of the model, under a key that says its type: ``REGIONS = Fact[Regions]("regions")``. The
key stands beside the class of the data, or the pass that finds it out. What is known at the start is given to the
compilation; all else is what passes return, and the manager alone writes it down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, cast

from torch import nn

from passes.errors import PassError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Fact(Generic[T_co]):
    """The key of something that is known of a model; it is itself, and no other of the same name."""

    def __init__(self, name: str) -> None:
        """Take the name that messages call it by."""
        self.name = name

    def __repr__(self) -> str:
        """The name."""
        return f"Fact({self.name!r})"


Facts: TypeAlias = Mapping[Fact[Any], Any]


class Compilation:
    """The model that is being rewritten, and what is known of it.

    Attributes:
        model: the model; passes change it in place.
    """

    def __init__(self, model: nn.Module, facts: Facts | None = None) -> None:
        """Take the model, and what is known at the start, such as the settings."""
        self.model = model
        self._facts: dict[Fact[Any], Any] = dict(facts or {})

    def __getitem__(self, fact: Fact[T]) -> T:
        """Return a fact, or say that it is not known."""
        if fact not in self._facts:
            raise PassError(f"{fact.name!r} is not known: no pass has written it, or who asks does not require it")
        return cast(T, self._facts[fact])

    def __contains__(self, fact: Fact[Any]) -> bool:
        """Whether a fact is known."""
        return fact in self._facts

    def only(self, *facts: Fact[Any]) -> Compilation:
        """The same model with some of the facts."""
        return Compilation(self.model, {fact: self[fact] for fact in facts})

    def learn(self, facts: Facts) -> None:
        """Write down what a pass has found out; for the manager alone."""
        self._facts.update(facts)

    def end(self, facts: Collection[Fact[Any]]) -> None:
        """Let go of facts that do not hold any more; for the manager alone."""
        self._facts = {fact: value for fact, value in self._facts.items() if fact not in facts}

    def take(self, fact: Fact[T]) -> T:
        """Return a fact, and let go of it."""
        found = self[fact]
        del self._facts[fact]
        return found


class Pass(ABC):
    """One step of the compiler.

    Attributes:
        name: what messages call it.
        requires: the facts that it reads; no others are to be had.
        ensures: the facts that it returns, all of them and no others. One that it requires too is replaced.
        ends: facts that do not hold any more once it has run, since it rewrites what they speak of.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Fact[Any], ...]] = ()
    ensures: ClassVar[tuple[Fact[Any], ...]] = ()
    ends: ClassVar[tuple[Fact[Any], ...]] = ()

    @abstractmethod
    def run(self, compilation: Compilation) -> Facts | None:
        """Rewrite the model in place, or find something out; return what it ensures, None if that is nothing."""

    def check(self, compilation: Compilation) -> str | None:
        """Return what is wrong with the result, or None; asked by the manager after `run`, of what it ensures too."""
        return None
