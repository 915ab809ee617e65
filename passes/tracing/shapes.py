"""Shapes: the value of every node of a graph as a fake tensor, under ``meta["val"]``; nothing is computed.

What each node writes to in place is noted with it (see `passes.tracing.mutation`).

Where no example inputs are known, some are guessed that fit the graph: a batch of 2 with the channels or features that
the first layer behind an argument reads, of one of the usual sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.errors import InputError, let_memory_errors_pass
from passes.infra.random_state import own_random_state
from passes.layers.channel_cut import channel_counts
from passes.layers.grouped import Grouped
from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.layers.known.geometry import is_layer, spatial_dims
from passes.layers.known.norms import is_norm
from passes.models.values import mapped, shapes_of
from passes.tracing.interpreter import Interpreter
from passes.tracing.mutation import WriteWatch, forget_written, note_written, storages

# Sizes of ImageNet, CIFAR, Inception and Kinetics; whoever has other data has example inputs too.
USUAL_SIZES: dict[int, list[tuple[int, ...]]] = {
    0: [()],
    1: [(224,), (64,)],
    2: [(224, 224), (32, 32), (299, 299), (64, 64), (256, 256)],
    3: [(16, 112, 112), (16, 224, 224), (8, 64, 64)],
}
MOST = 500  # operations of a node for guessed inputs, some hundredths of a second: code may loop over every pixel


def propagate_shapes(graph: fx.GraphModule, inputs: tuple[object, ...], most: int | None = None) -> None:
    """Note the value of each node of `graph` for `inputs`, as a fake tensor, under ``meta["val"]``.

    A node that takes more than `most` operations counts as one that the inputs do not fit; None sets no limit.

    Raises:
        InputError: the inputs do not fit; says at which layer.
    """
    with own_random_state(), _quiet():
        _ShapePropagation(graph).propagate(inputs, most)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging operations that don't fit: they are answered by an error, or by the next guess."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def forget_shapes(graph: fx.GraphModule) -> None:
    """Remove the values of all nodes."""
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
        forget_written(node)


def find_shapes(graph: fx.GraphModule, inputs: tuple[object, ...] | None) -> bool:
    """Note the values for `inputs` (in train mode a norm may want a batch of two of them), else for guessed ones.

    Returns:
        Whether they are known now. A graph that has shapes already keeps them.
    """
    if all("val" in node.meta for node in graph.graph.nodes):
        return True
    for each in _guesses(graph) if inputs is None else (inputs, _twice(inputs)):
        try:
            propagate_shapes(graph, each, MOST if inputs is None else None)
        except InputError:
            continue
        return True
    return False


def without_storage(value: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that takes no memory."""
    return torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)


def _twice(inputs: tuple[object, ...]) -> tuple[object, ...]:
    return mapped(inputs, lambda x: torch.cat([x, x]) if x.dim() else x)


def _guesses(graph: fx.GraphModule) -> Iterator[tuple[Tensor, ...]]:
    """Guessed inputs, one size after the other: tensors without storage, of the parameters' dtype and device."""
    like = next(graph.parameters(), torch.empty(0))
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder" and not node.args]
    features = [shape for node in arguments if (shape := _features(graph, node)) is not None]
    if len(features) < len(arguments):
        return
    for choice in range(max((len(USUAL_SIZES[dims]) for _, dims in features), default=0)):
        sizes = [USUAL_SIZES[dims][min(choice, len(USUAL_SIZES[dims]) - 1)] for _, dims in features]
        yield tuple(like.new_zeros(()).expand(2, read, *size) for (read, _), size in zip(features, sizes, strict=True))


def _features(graph: fx.GraphModule, argument: fx.Node) -> tuple[int, int] | None:
    """Channels that the first layer behind an argument reads, and the spatial dimensions it works on."""
    behind = [argument]
    for node in behind:  # grows as it goes: whatever stands between the argument and the layer
        for user in node.users:
            module: Any = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
            if is_layer(module):
                return channel_counts(module)[1], spatial_dims(module)
            if user not in behind:
                behind.append(user)
    return None


@contextmanager
def _fake_tensors(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Give all parts of a module fake parameters and buffers, and put everything back that code changes meanwhile."""
    registries = ("_parameters", "_buffers")
    parts = list(module.modules())
    before = [{**part.__dict__, **{key: dict(part.__dict__[key]) for key in registries}} for part in parts]
    try:
        for part in parts:
            for key in registries:
                tensors = part.__dict__[key].items()
                part.__dict__[key] = {name: x if x is None else mode.from_tensor(x) for name, x in tensors}
        yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            part.__dict__.clear()
            part.__dict__.update(attributes)


class _ShapePropagation(Interpreter):
    """Runs a graph on fake tensors and notes each node's value."""

    def propagate(self, inputs: tuple[object, ...], most: int | None) -> None:
        """Propagate the shapes of `inputs` through the graph, by at most `most` operations for each node."""
        self.extra_traceback = False  # or fx appends its own words to our messages
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = mapped(inputs, mode.from_tensor)
        expected = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(fakes) > len(expected):
            raise InputError(f"example_inputs has {len(fakes)} tensors, the model's forward takes {len(expected)}")
        self._given = shapes_of(inputs)
        self._watch, self._known = WriteWatch(most), set[int]()
        with _fake_tensors(self.module, mode), mode, torch.no_grad(), self._watch:
            self.run(*fakes)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, or say at once what its result's shape is, where torch would take many steps to say it."""
        module = self.fetch_attr(target)
        if is_norm(module) and len(args) == 1 and isinstance(args[0], Tensor):
            if args[0].dim() < 2 or args[0].shape[1] != channel_counts(module)[0]:
                raise ValueError(f"it has {channel_counts(module)[0]} channels")
            return torch.empty_like(args[0])
        if isinstance(module, Grouped) and is_as_torch_made_it(module):
            return module.with_weight(args[0], args[0].new_empty(module.dense_shape))
        if isinstance(module, nn.RNNBase) and is_as_torch_made_it(module) and args and isinstance(args[0], Tensor):
            return _recurrent(module, args[0])
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node, and say where it was when shapes do not fit."""
        self._watch.start()
        before = storages([node.meta["val"] for node in n.all_input_nodes])
        try:
            value = super().run_node(n)
        except Exception as error:
            let_memory_errors_pass(error)
            where = f"at layer {n.target!r}" if n.op == "call_module" else f"at {n.name!r}"
            raise InputError(f"example_inputs of shape {self._given} do not fit the model {where}: {error}") from error
        n.meta["val"] = value
        replaced = before ^ storages([node.meta["val"] for node in n.all_input_nodes])  # by ``x.data = y``
        note_written(n, self._watch.seen & self._known | replaced)
        self._known |= storages(value)
        return value


def _recurrent(module: nn.RNNBase, x: Tensor) -> Any:
    """What a recurrent layer gives for ``[L, features]`` or a batch of these; torch would compute step by step."""
    if x.dim() not in (2, 3) or x.shape[-1] != module.input_size:
        raise ValueError(f"it reads {module.input_size} features")
    sides = 2 if module.bidirectional else 1
    features = module.proj_size or module.hidden_size
    batch = [x.shape[0 if module.batch_first else 1]] if x.dim() == 3 else []
    hidden = x.new_empty(module.num_layers * sides, *batch, features)
    state: Any = hidden
    if module.mode == "LSTM":
        state = hidden, x.new_empty(module.num_layers * sides, *batch, module.hidden_size)
    return x.new_empty(*x.shape[:-1], sides * features), state
