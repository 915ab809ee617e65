"""Regions: a model that torch.fx can't trace whole is understood in its largest traceable parts.

1. A model that can be traced whole is one region.
2. Otherwise its submodules are tried, from the outside in; one that can be traced in all modes is a region. A single
   layer is none: nothing around it is known.
3. A part whose forward has optional arguments is a region only where a run has shown how it is called, since which
   graph it has may depend on them.
4. Untraced code that asks modules for their parameters may read those of the parts below it; without a run, these
   are no regions.
5. What lies outside every region, or in a leaf module that was named, is known by a run of the example inputs alone,
   or not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType

from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.grouped import Grouped
from passes.options.names import covers
from passes.options.settings import SETTINGS
from passes.tracing.observation import Observation, observe
from passes.tracing.trace import Region, Tracing, UntraceableError
from passes.tracing.tracer import join

ASKS_FOR_PARAMETERS = {"weight", "bias", "parameters", "named_parameters", "_parameters", "state_dict"}
COUNTS = {"in_channels", "out_channels", "in_features", "out_features", "num_features"}
SETTING_UP = ("__init__", "_init", "reset", "_load")


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

    def empty(self) -> None:
        """Take the modules out of the graphs, which nobody can use any more.

        A graph and its module hold each other, and would hold the weights until garbage is collected, which takes long
        in a large process.
        """
        for region in self.parts:
            for graph in region.graphs.values():
                graph._modules.clear()


REGIONS = Fact[Regions]("regions")


def find_regions(
    model: nn.Module, example_inputs: tuple[object, ...] | None = None, leaf_modules: Collection[str] = ()
) -> Regions:
    """Trace `model` whole, or in its largest traceable parts.

    Args:
        model: any module; it is neither run nor changed.
        example_inputs: positional arguments of its forward. If the model can't be traced whole, they are run through
            a shadow of it.
        leaf_modules: paths of modules that are not to be traced into.

    Raises:
        InputError: the example inputs do not fit the model.
    """
    tracing, leaves = Tracing(model, leaf_modules), frozenset(leaf_modules)
    why = whole = None
    try:
        whole = tracing.whole(example_inputs)
    except UntraceableError as error:
        why = error.why
    if whole is not None and not leaves:
        return Regions((whole,), closed=tracing.closed)
    observation = None if example_inputs is None else observe(tracing, example_inputs)
    parts = _parts(tracing, model, "", leaves, observation) if whole is None else (whole,)
    return Regions(tuple(parts), leaves, why, observation, tracing.closed)


def _parts(
    tracing: Tracing, module: nn.Module, path: str, leaves: frozenset[str], observation: Observation | None
) -> Iterator[Region]:
    if (observation is None or "eval" in observation.failures) and mentions(type(module), ASKS_FOR_PARAMETERS):
        return
    for name, child in module.named_children():
        below = join(path, name)
        if below in leaves or isinstance(child, _ConvNd | nn.Linear | Grouped):
            continue
        given = _arguments(child, below, observation)
        if given is not None:
            try:
                yield tracing.part(below, given)
                continue
            except UntraceableError:
                pass
        yield from _parts(tracing, child, below, leaves, observation)


def _arguments(module: nn.Module, path: str, observation: Observation | None) -> int | None:
    """With how many arguments a submodule is called, or None if it can't be known, or is not called as a whole."""
    if type(module).forward is nn.Module.forward:  # a list or dict of modules
        return None
    parameters = inspect.signature(module.forward).parameters.values()
    if all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return len(parameters)
    seen = observation.called.get(path, {}) if observation is not None else {}
    counts = {None if kwargs else len(args) for args, kwargs in seen.values()}
    return counts.pop() if len(counts) == 1 else None


def mentions(kind: type[nn.Module], names: Collection[str]) -> bool:
    """Whether the code of a class, but for what sets it up, mentions one of these names."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith("torch.nn.")]
    members = [member for base in bases for member in vars(base).items()]
    functions = (f for name, f in members if isinstance(f, FunctionType) and not name.startswith(SETTING_UP))
    return any(_mentions(function.__code__, names) for function in functions)


def _mentions(code: CodeType, names: Collection[str]) -> bool:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return not set(names).isdisjoint(code.co_names) or any(_mentions(each, names) for each in nested)


class Trace(Pass):
    """Write the regions of the model."""

    name = "trace"
    requires = (SETTINGS,)
    ensures = (REGIONS,)

    def run(self, compilation: Compilation) -> Facts:
        """Trace the model, whole or in parts."""
        settings = compilation[SETTINGS]
        return {REGIONS: find_regions(compilation.model, settings.example_inputs, settings.leaf_modules)}
