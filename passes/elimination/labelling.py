"""Labelling: one graph, node by node, with labels for every value by the rules for each operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.elimination import rules
from passes.elimination.labels import along, compact, fixed, varying
from passes.elimination.operations import (
    ALONG_ONE_DIM,
    COUNTING,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    LOCAL,
    LOCAL_MODULES,
    PLAIN_ATTRIBUTES,
    PLAIN_METHODS,
    REDUCTIONS,
    RELATIVE,
    dims_along,
    name_of,
)
from passes.errors import let_memory_errors_pass
from passes.layers.channel_cut import channel_dim, is_cuttable, is_depthwise
from passes.layers.known.as_torch_made_it import change_of, is_as_torch_made_it
from passes.tracing.mutation import works_in_place
from passes.tracing.trace import Region

if TYPE_CHECKING:
    from passes.elimination.analysis import Channels


class _Sizes:
    """The sizes of a value, which may be asked for one by one."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels


def label_values(channels: Channels, region: Region, graph: fx.GraphModule, uncuttable: Mapping[str, str]) -> None:
    """Take labels through `graph`, and note in `channels` what is tied, held and read.

    Args:
        channels: the analysis.
        region: the region that the graph belongs to.
        graph: one of its graphs, with shapes under ``meta["val"]``.
        uncuttable: the modules that can't be cut, with the reason.
    """
    _Labelling(channels, region, graph, uncuttable).run()


class _Labelling:
    def __init__(
        self, channels: Channels, region: Region, graph: fx.GraphModule, uncuttable: Mapping[str, str]
    ) -> None:
        self.channels, self.region, self.graph, self.uncuttable = channels, region, graph, uncuttable
        self.labels: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            try:
                labels = self._visit(node)
                self._check(node, labels)
            except Exception as error:  # an unusual call of a known operation: as if it were unknown
                let_memory_errors_pass(error)
                labels = self._give_up(node, str(error) if isinstance(error, rules.NotUnderstoodError) else "")
            for path in node.meta.get("given_by", ()):
                self._check_given(path, labels)
            if (reason := node.meta.get("exposed")) is not None:
                self._expose(labels, f"seen by {reason}")
                labels = _unknown(node)
            self.labels[node] = labels

    def _check(self, node: fx.Node, labels: Any) -> None:
        """Every tensor has labels in its shape, or the rule was not made for this call."""
        pairs = zip(pytree.tree_leaves(labels), pytree.tree_leaves(node.meta["val"]), strict=False)
        if any(isinstance(a, Tensor) and (not isinstance(b, Tensor) or a.shape != b.shape) for a, b in pairs):
            raise rules.NotUnderstoodError("called in an unusual way")

    def _visit(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return _unknown(node)
        if node.op == "output":
            self._read_all(node, f"given out by {self.region.path!r}" if self.region.path else "given out by the model")
            return None
        if node.op == "call_module":
            return self._module(node, self.graph.get_submodule(str(node.target)))
        return self._operation(node, name_of(node.target))

    def _operation(self, node: fx.Node, name: str) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        first: Any = args[0] if args else None
        rest: Any = args[1:]
        if not isinstance(first, Tensor) and not self._operands(node):
            return self._on_no_tensor(node, name, first, rest)
        if name == "getitem" and isinstance(first, tuple):
            return first[rest[0]]  # one of several values
        if (name == "getattr" and rest[0] in PLAIN_ATTRIBUTES) or name in PLAIN_METHODS:
            return None
        if (name == "getattr" and rest[0] == "shape") or (name == "size" and not rest and not kwargs):
            return _Sizes(first)
        if name == "size":
            return self._size(node, first, rest[0] if rest else kwargs["dim"])
        if name in ELEMENTWISE:
            return rules.elementwise(self.channels, self._operands(node), node.meta["val"].shape)
        if works_in_place(self.graph, node):
            return self._give_up(node)  # what it changes may be read under another name
        if name in LOCAL:
            return rules.local(first, node.meta["val"], dims_along(LOCAL[name], first.dim()))
        if name in REDUCTIONS:
            keepdim = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
            return rules.reduction(first, rest[0] if rest else kwargs.get("dim"), keepdim)
        if name in ALONG_ONE_DIM:
            rules.along_others(first, rest[0] if rest else kwargs.get("dim"))
            return first
        if name in RELATIVE or name in COUNTING:
            return rules.moving(self.channels, name, node.target, args, kwargs, f"counted by {node.name!r}")
        return self._give_up(node)

    def _on_no_tensor(self, node: fx.Node, name: str, first: Any, rest: tuple[Any, ...]) -> Any:
        """An operation on sizes and numbers, or one that makes a tensor from them."""
        if isinstance(first, _Sizes) and name == "getitem":
            return self._size(node, first.labels, rest[0])
        if any(isinstance(self.labels[each], _Sizes) for each in node.all_input_nodes):
            return self._give_up(node)
        return _unknown(node)

    def _size(self, node: fx.Node, labels: Tensor, index: Any) -> None:
        """Someone asks how large a value is along some dimension; nobody does where the answer is thrown away."""
        asked = range(labels.dim())[index]
        if node.users and varying(labels) & set([asked] if isinstance(asked, int) else asked):
            self.channels.hold(labels, f"counted by {node.name!r}")

    def _module(self, node: fx.Node, module: nn.Module) -> Any:
        path, operands, value = self.region.module_path(node), self._operands(node), node.meta["val"]
        if not is_as_torch_made_it(module):
            return self._give_up(node, self.uncuttable.get(path) or change_of(module) or "")
        if type(module) in ELEMENTWISE_MODULES:
            return rules.elementwise(self.channels, operands, value.shape)
        if type(module) in LOCAL_MODULES:
            return rules.local(operands[0], value, dims_along(LOCAL_MODULES[type(module)], operands[0].dim()))
        if type(module) is nn.Flatten:
            return operands[0].flatten(module.start_dim, module.end_dim)
        if path in self.uncuttable or not is_cuttable(module):
            return self._give_up(node, self.uncuttable.get(path, ""))
        site = self.channels.site(path, module)
        from_end = channel_dim(module, value.dim()) - value.dim()
        labels = operands[0] if len(operands) == 1 else None
        if labels is None or not labels.numel() or varying(labels) - {labels.dim() + from_end}:
            site.reads.append(site.none_known())
            if site.slots is not None:
                self.channels.hold(site.slots, "called in a way that isn't understood")
            return self._give_up(node)
        site.reads.append(_slots_along(labels, from_end))
        if site.slots is None:
            return rules.local(labels, value)
        if is_depthwise(module):
            self.channels.tie(site.slots, site.reads[-1])
        return along(site.slots, value.shape, from_end)

    def _check_given(self, path: str, labels: Any) -> None:
        """Hold the channels of a custom layer that does not give its filters in their order: hooks count on that."""
        site = self.channels.sites.get(path)
        if site is None or site.slots is None:
            return
        if isinstance(labels, Tensor):
            dim = channel_dim(site.module, labels.dim())
            alike = 0 <= dim < labels.dim() and labels.shape[dim] == len(site.slots)
            if alike and torch.equal(compact(labels), compact(along(site.slots, labels.shape, dim - labels.dim()))):
                return
        self.channels.hold(site.slots, "given in another order by the layer's own code")

    def _argument(self, node: fx.Node) -> Any:
        labels = self.labels[node]
        return node.meta["val"] if labels is None else labels

    def _operands(self, node: fx.Node) -> list[Tensor]:
        """Labels of all tensors that a node reads."""
        return [
            x for each in node.all_input_nodes for x in pytree.tree_leaves(self.labels[each]) if isinstance(x, Tensor)
        ]

    def _give_up(self, node: fx.Node, why: str = "") -> Any:
        """Expose all that a node reads; nothing is known of what it gives."""
        name = node.name
        if node.op == "call_module":
            name = f"{type(self.graph.get_submodule(str(node.target))).__name__} {self.region.module_path(node)!r}"
        self._read_all(node, f"read by {name}" + (f" ({why})" if why else ""))
        return _unknown(node)

    def _read_all(self, node: fx.Node, reason: str) -> None:
        for each in node.all_input_nodes:
            self._expose(self.labels[each], reason)

    def _expose(self, labels: Any, reason: str) -> None:
        for each in pytree.tree_leaves(labels):
            if isinstance(each, Tensor):
                self.channels.hold(each, reason)
            elif isinstance(each, _Sizes):
                self.channels.hold(each.labels, reason)


def _unknown(node: fx.Node) -> Any:
    """Labels of a value of which nothing is known; None for what is no tensor."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return fixed(value.shape)
    return tuple(fixed(x.shape) for x in value) if _is_tensors(value) else None


def _is_tensors(value: Any) -> bool:
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(x, Tensor) for x in value)


def _slots_along(labels: Tensor, dim: int) -> Tensor:
    """The slots along the one dimension in which labels vary, int64 ``[channels]``."""
    small = compact(labels)
    return small.expand(*small.shape[:dim], labels.shape[dim], *small.shape[dim:][1:]).flatten()
