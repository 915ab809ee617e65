"""Channel analysis: which channels of which layer are read, and by whom, in all of a model's graphs.

1. Every output channel of a layer that can be cut has a slot. Labels say, for every value in a graph, which slots lie
   where in it; rules (`passes.elimination.rules`) take them through each operation.
2. Slots that meet in a sum or product are tied: all of them can be taken out, or none. Ties are a networkx graph, whose
   components are the classes that stay or go together.
3. A class is held if an output, a hook or an operation that isn't understood reads it, or something counts its channels
   by number.
4. A class is read if it is held, so that whatever is left is what it was, or if a layer of which some filter is read
   reads it by one of its kept connections: the least fixed point over all graphs together. The others can go.
5. A layer keeps at least one filter that reads something: no tensor loses its last channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import networkx as nx
import torch
from torch import Tensor, nn

from passes.elimination.labelling import label_values
from passes.elimination.labels import compact
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.channel_cut import channel_counts, is_depthwise, may_be_cut, present_plan
from passes.layers.custom import Custom, is_custom
from passes.layers.grouped import Grouped
from passes.layers.known.as_torch_made_it import change_of
from passes.layers.known.norms import is_norm
from passes.layers.plan import LayerPlan
from passes.models.values import tensors_in
from passes.options.names import holders_of
from passes.options.settings import SETTINGS
from passes.tracing.regions import COUNTS, REGIONS, Regions, find_regions, mentions
from passes.tracing.shapes import find_shapes
from passes.tracing.trace import Region, module_calls
from passes.tracing.usage import Usage

ReadingRule: TypeAlias = Callable[[Tensor], Tensor]


@dataclass
class Site:
    """A module that can be cut, and what its calls read.

    Attributes:
        module: the module.
        slots: int64 ``[C_out]``: the slots of its outputs; None for a norm, which passes on those that it reads.
        reads: for each call, int64 ``[C_in]``: the slots that its inputs come from.
    """

    module: nn.Module
    slots: Tensor | None
    reads: list[Tensor] = field(default_factory=list)

    def none_known(self) -> Tensor:
        """What a call reads of which nothing is known."""
        return torch.zeros(channel_counts(self.module)[1], dtype=torch.int64)


class Channels:
    """The result of the analysis.

    Attributes:
        sites: the modules that can be cut, by path.
        reasons: why channels of a layer are read or held by something other than a layer, by path.
        present: bool, by slot: whether it stays.
        readers: who reads whom, by path: an edge leads from a layer to each module that reads some of its channels.
    """

    def __init__(self) -> None:
        """Start with slot 0, which is nobody's."""
        self.sites: dict[str, Site] = {}
        self.reasons: dict[str, str] = {}
        self.present = torch.zeros(0, dtype=torch.bool)
        self.readers: nx.DiGraph = nx.DiGraph()
        self._owners = ["outside"]
        self._starts = [0]
        self._size = 1
        self._ties: nx.Graph = nx.Graph()
        self._held: list[tuple[Tensor, str]] = []

    def site(self, path: str, module: nn.Module) -> Site:
        """The site of a module that can be cut; a layer gets slots of its own."""
        if path not in self.sites:
            slots = None
            if not is_norm(module):
                count = channel_counts(module)[0]
                slots = torch.arange(self._size, self._size + count)
                self._owners.append(path)
                self._starts.append(self._size)
                self._size += count
            self.sites[path] = Site(module, slots)
        return self.sites[path]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Slots at the same places of two label tensors stay or go together; beside slot 0 they are held."""
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)], 1)
        pairs = torch.unique(pairs[pairs[:, 0] != pairs[:, 1]], dim=0)
        alone = (pairs == 0).any(1)
        self.hold(pairs[alone], "met by a tensor that is no layer's output")
        self._ties.add_edges_from(pairs[~alone].tolist())

    def hold(self, labels: Tensor, reason: str) -> None:
        """These channels can't be taken out: something that is no layer reads them, or counts them by number."""
        slots = torch.unique(compact(labels))
        self._held.append((slots[slots > 0], reason))

    def solve(self) -> None:
        """Find out what is read and what is held, by whom and why, once all graphs are labelled."""
        for site in self.sites.values():
            for read in site.reads[1:]:
                self.tie(site.reads[0], read)
        self._name()
        classes = torch.arange(self._size)
        for number, members in enumerate(nx.connected_components(self._ties)):
            classes[list(members)] = self._size + number
        count = self._size + self._ties.number_of_nodes() + 1
        read = torch.zeros(count, dtype=torch.bool)
        read[classes[torch.cat([torch.zeros(1, dtype=torch.int64), *(slots for slots, _ in self._held)])]] = True
        self._spread(classes, read)
        self.present = read[classes]

    def _name(self) -> None:
        """Say in `readers` and `reasons` which layers the slots belong to."""
        owner_of = torch.repeat_interleave(torch.tensor([*self._starts, self._size]).diff())

        def owners(slots: Tensor) -> list[str]:
            return [self._owners[number] for number in torch.unique(owner_of[slots]).tolist()]

        for path, site in self.sites.items():
            self.readers.add_edges_from((owner, path) for owner in owners(torch.cat(site.reads)))
        for slots, reason in self._held:
            for path in owners(slots):
                self.reasons.setdefault(path, reason)

    def _spread(self, classes: Tensor, read: Tensor) -> None:
        """Follow what is read up the network until nothing changes."""
        layers = [(s.slots, s, reading_rule(s.module)) for s in reversed(self.sites.values()) if s.slots is not None]
        self._settle(classes, read, layers)
        for slots, site, rule in layers:  # if nothing is left of a layer, one filter stays all the same
            if not rule(read[classes[slots]]).any():
                read[classes[slots[first_reader(site.module)]]] = True
                self._settle(classes, read, layers)

    def _settle(self, classes: Tensor, read: Tensor, layers: list[tuple[Tensor, Site, ReadingRule]]) -> None:
        """Spread what is read until a round over all layers finds nothing new."""
        before, now = -1, int(read.sum())
        while now != before:
            for slots, site, rule in layers:
                inputs = rule(read[classes[slots]])
                for reads in site.reads:
                    read[classes[reads[inputs]]] = True
            before, now = now, int(read.sum())


CHANNELS = Fact[Channels]("channels")


def reading_rule(module: nn.Module) -> ReadingRule:
    """How a layer reads: from which of its filters are read, bool ``[C_out]``, to the inputs they read, ``[C_in]``."""
    if isinstance(module, Grouped):
        plan = present_plan(module)
        return lambda filters: _read_by_groups(plan, filters)
    if is_depthwise(module):
        return lambda filters: filters
    inputs = channel_counts(module)[1]
    return lambda filters: filters.any().expand(inputs)


def _read_by_groups(plan: LayerPlan, filters: Tensor) -> Tensor:
    if plan.labels is None or plan.keep is None:
        return torch.ones(plan.in_channels, dtype=torch.bool)
    return plan.keep[torch.unique(plan.labels[filters])].any(0)


def first_reader(module: nn.Module) -> int:
    """The first filter of a layer that reads an input."""
    if not isinstance(module, Grouped):
        return 0
    return int(present_plan(module).mask().any(1).nonzero()[0, 0])


def analyse(model: nn.Module, regions: Regions, example_inputs: tuple[object, ...] | None = None) -> Channels:
    """Analyse the channels of `model`, whose parts `regions` are, in all modes.

    Layers that can't be cut, and those outside the regions, have no site: what they read is held.
    """
    channels, usage = Channels(), Usage(model, regions)
    obstacles = {region.path: _unknown(region, regions, example_inputs) for region in regions.parts}
    fixed = dict(uncuttable(model, usage))
    for region in regions.parts:
        around = ["", *holders_of(region.path)] if region.path else []
        if any(mentions(type(model.get_submodule(path)), COUNTS) for path in around):
            obstacles[region.path] = "code around it, which can't be traced, asks layers for their number of channels"
        if (obstacle := obstacles[region.path]) is not None:
            fixed.update({path: obstacle for _, path, _ in module_calls([region])})
    for region in regions.parts:
        if obstacles[region.path] is None:
            for graph in region.graphs.values():
                label_values(channels, region, graph, fixed)
    channels.solve()
    for path, reason in fixed.items():
        channels.reasons.setdefault(path, reason)
    return channels


def _unknown(region: Region, regions: Regions, example_inputs: tuple[object, ...] | None) -> str | None:
    """Why nothing can be cut in a region, or None."""
    seen = regions.observation
    if region.path and seen is None:
        return "only a part of the model could be traced: give example_inputs, so that a run can show how it is used"
    if region.path and seen is not None and seen.failures:
        return next(iter(seen.failures.values()))
    for mode, graph in region.graphs.items():
        inputs = example_inputs
        if region.path and seen is not None:
            observed = seen.called.get(region.path, {})
            inputs = observed[mode][0] if mode in observed else None
            if inputs is not None and any(not x.numel() for x in tensors_in(inputs)):
                return f"called with an empty tensor in {mode} mode: give example_inputs of which something reaches it"
        if not find_shapes(graph, inputs):
            return f"the shapes in its {mode} graph are not known: give example_inputs that fit it"
    return None


def uncuttable(model: nn.Module, usage: Usage) -> Iterator[tuple[str, str]]:
    """The layers and norms whose channels can't be cut, with the reason."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for value in [*module._buffers.values(), *module._modules.values()]:
            holders[id(value)] = holders.get(id(value), 0) + 1
    strays = usage.regions.observation.strays if usage.regions.observation is not None else frozenset()
    roots = {region.path for region in usage.regions.parts}
    for path, module in model.named_modules():
        if may_be_cut(module):
            reason = _obstacle(path, module, usage, holders)
            if any((path, root) in strays for root in roots if root and f"{path}.".startswith(f"{root}.")):
                reason = "called from outside its region too"
            if reason is not None:
                yield path, reason


def _obstacle(path: str, module: nn.Module, usage: Usage, holders: dict[int, int]) -> str | None:
    custom = isinstance(module, Custom) or is_custom(module)
    if (change := change_of(module)) is not None or (module._modules and not custom):
        return change or "it holds other modules"
    if usage.called_around(path):
        return "inside a module that is called as a whole"
    tensors = [*module._parameters.items(), *module._buffers.items()]
    if custom:  # what else it holds is not cut, and meets its channels in the graph
        tensors = [(name, module._parameters[name]) for name in ("weight", "bias")]
    if any(f"{path}.{name}" in usage.sharers or f"{path}.{name}" in usage.read for name, _ in tensors):
        return "its parameters are shared, or read by others"
    if any(id(tensor) in usage.listed or holders.get(id(tensor), 0) > 1 for _, tensor in tensors if tensor is not None):
        return "its parameters are held elsewhere too"
    if id(module) in usage.listed or holders.get(id(module), 0) > 1:
        return "it is held in several places"
    return None


class ChannelAnalysis(Pass):
    """Find out who reads which channels of a lowered model, which it traces anew."""

    name = "channels"
    requires = (SETTINGS,)
    ensures = (REGIONS, CHANNELS)

    def run(self, compilation: Compilation) -> Facts:
        """Trace and analyse the model as it is now."""
        model, settings = compilation.model, compilation[SETTINGS]
        regions = find_regions(model, settings.example_inputs, settings.leaf_modules)
        return {REGIONS: regions, CHANNELS: analyse(model, regions, settings.example_inputs)}
