"""How the layers and parameters of a model are used: by which calls, by which other operations, and from where."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from passes.layers.surgery import hook_dicts
from passes.models.rebinding import held_by
from passes.options.names import holders_of
from passes.tracing.regions import Regions
from passes.tracing.trace import module_calls


class Usage:
    """How the layers and parameters of a model are used in all of its graphs.

    Attributes:
        called: paths of the modules that graphs call as a whole, with the names of their classes.
        opened: paths of the custom layers among these, whose own code is in the graphs too.
        first_convolutions: path of the convolution that runs first, of each graph.
        read: paths of the tensors that operations read outside a call of their module.
        sharers: parameters that overlap in memory with another one, with the other's path.
        listed: ids of modules and parameters that some module also holds unregistered, with where.
        regions: the graphs, and what is known of what lies outside.
    """

    def __init__(self, model: nn.Module, regions: Regions) -> None:
        """Read the graphs and the parameters' places."""
        self.regions = regions
        self.called: dict[str, str] = {}
        self.opened = {path for region in regions.parts for path in region.opened}
        self.first_convolutions: set[str] = set()
        modes: set[str] = set()
        for mode, path, module in module_calls(regions.parts):
            self.called[path] = type(module).__name__
            if isinstance(module, _ConvNd) and mode not in modes:
                modes.add(mode)
                self.first_convolutions.add(path)
        if regions.observation is not None:
            modules = dict(model.named_modules())
            order = (path for path in regions.observation.called if isinstance(modules[path], _ConvNd))
            self.first_convolutions = set(list(order)[:1])
        self.read = {
            region.module_path(node)
            for region in regions.parts
            for graph in region.graphs.values()
            for node in graph.graph.nodes
            if node.op == "get_attr"
        }
        self.read.update(path for region in regions.parts for path in region.read)
        self.sharers = _sharers(model)
        self.listed = _listed(model)

    def called_around(self, path: str) -> list[str]:
        """Paths of the modules that hold the one at `path` and are called as a whole, from the outside in."""
        return [each for each in holders_of(path) if each in self.called and each not in self.opened]

    def arguments(self, path: str) -> list[tuple[tuple[object, ...], dict[str, object]]]:
        """What a module is called with, as far as it is known: tensors without storage, or fake ones."""
        if self.regions.observation is not None and path in self.regions.observation.called:
            return list(self.regions.observation.called[path].values())
        nodes = (
            node
            for region in self.regions.parts
            for graph in region.graphs.values()
            for node in graph.graph.nodes
            if node.op == "call_module" and region.module_path(node) == path
        )
        known = (node for node in nodes if all("val" in each.meta for each in node.all_input_nodes))
        return [fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"]) for node in known]

    def doubt(self, path: str) -> str | None:
        """Why it isn't known that a layer's parameters are used by its own call alone, or None if it is."""
        observation = self.regions.observation
        if observation is not None and path in observation.foreign:
            return f"its parameters are used outside its own call, by {observation.foreign[path]!r}"
        where = self.regions.outside(path)
        if where is None:
            return None if path in self.called else "nothing calls it, in eval or in train mode"
        if observation is None:
            return f"{where}: give example_inputs, so that a run can show how it is used"
        if observation.failures:
            return f"{where}, and {next(iter(observation.failures.values()))}"
        return None if path in observation.called else f"{where}, and the example inputs did not reach it"


def _sharers(model: nn.Module) -> dict[str, str]:
    """Parameters that overlap in memory with another one (or are registered twice): path to the other's path."""
    spans = []
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter.data) is Tensor and parameter.layout == torch.strided and parameter.numel():
            start = parameter.data_ptr()
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            spans.append((str(parameter.device), start, start + length * parameter.element_size(), path))
    spans.sort()
    sharers: dict[str, str] = {}
    widest = None
    for span in spans:
        if widest is not None and widest[0] == span[0] and span[1] < widest[2]:
            sharers.setdefault(span[3], widest[3])
            sharers.setdefault(widest[3], span[3])
        if widest is None or widest[0] != span[0] or span[2] > widest[2]:
            widest = span
    return sharers


def _listed(model: nn.Module) -> dict[int, str]:
    """Modules and parameters that some module also holds unregistered (in a list or a function, say): id to where."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules", *hook_dicts(module)):
                held = (each for each in held_by(value) if isinstance(each, nn.Module | nn.Parameter))
                found.update((id(each), f"{path}.{key}".lstrip(".")) for each in held if id(each) not in found)
    return found
