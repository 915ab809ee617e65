"""The plain data that passes exchange: what each of them finds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from passes.options.names import covers


@dataclass(frozen=True)
class Target:
    """What is asked of one layer: at most `groups` groups, and the share `ratio` of its connections pruned."""

    groups: int
    ratio: float


@dataclass(frozen=True)
class Region:
    """A part of the model that torch.fx can trace.

    Attributes:
        path: path of its root in the model; "" for the whole model.
        graphs: a graph for each mode: "eval", "train", and "mixed" where the model's own modes are.
        read: paths of the parameters that operations used while tracing, outside of a layer's own call.
        opened: paths of the custom layers that were traced into: a plain layer is called under their path.
    """

    path: str
    graphs: dict[str, fx.GraphModule]
    read: frozenset[str] = frozenset()
    opened: frozenset[str] = frozenset()

    def module_path(self, node: fx.Node) -> str:
        """Path in the model of the module or tensor that a node of one of the graphs names."""
        return f"{self.path}.{node.target}" if self.path else str(node.target)


@dataclass(frozen=True)
class Observation:
    """What runs of the example inputs through copies of the model showed.

    Attributes:
        called: paths of the modules that were called, in order of execution, with the arguments of their first call
            in each mode (tensors without storage).
        foreign: paths of layers whose parameters were used outside their own call, with the operation.
        strays: pairs of a module and one that holds it, where the first was called outside a call of the second.
        failures: modes in which the inputs could not be run, with the reason.
    """

    called: dict[str, dict[str, tuple[tuple[object, ...], dict[str, object]]]]
    foreign: dict[str, str]
    strays: set[tuple[str, str]]
    failures: dict[str, str]


@dataclass(frozen=True)
class Regions:
    """The parts of a model that torch.fx can trace, and what is known of the rest.

    Attributes:
        parts: the regions, in the order of ``named_modules()``; none holds another.
        untraceable: why the model could not be traced whole, or None if it was.
        leaves: paths of the modules that were not to be traced into.
        observation: what a run of the example inputs showed, where the regions do not cover the whole model.
        closed: paths of the custom layers that are leaves, with the reason if their weight is not used as it is, or "".
    """

    parts: tuple[Region, ...]
    leaves: frozenset[str] = frozenset()
    untraceable: str | None = None
    observation: Observation | None = None
    closed: Mapping[str, str] = field(default_factory=dict)

    def outside(self, path: str) -> str | None:
        """Where a module lies that is in no graph: outside every region, or in a leaf module; None if it is in one."""
        leaf = next((leaf for leaf in self.leaves if covers(leaf, path)), None)
        if leaf is not None:
            return f"inside the leaf module {leaf!r}"
        if any(covers(region.path, path) for region in self.parts):
            return None
        return f"outside every part that can be traced ({self.untraceable})"


@dataclass(frozen=True)
class Groups:
    """The groups of one layer: int64 labels ``[C_out]`` and float64 centroids ``[groups, C_in]``."""

    labels: Tensor
    centroids: Tensor
