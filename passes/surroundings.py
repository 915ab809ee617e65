"""What follows a layer, as far as it decides what the layer's output should be.

    layer → norm (of running statistics)? → sum with another branch? → ReLU?

Each link must be the only reader of the one before it, or something else would read a tensor that is being bent. A norm
in eval mode is affine per channel, so a wanted value behind it has exactly one wanted value before it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
CLIPS = (F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, "relu", "relu_")


@dataclass(frozen=True)
class Surroundings:
    """What follows one call of a layer.

    Attributes:
        norm: the call of the norm that alone reads the layer, or None.
        other: the node that is added to the layer's (normed) output, or None.
        clipped: whether all of it is read through a ReLU alone.
    """

    norm: fx.Node | None
    other: fx.Node | None
    clipped: bool


def surroundings(graph: fx.GraphModule, node: fx.Node) -> Surroundings:
    """Look at what follows the call `node` of a layer in `graph`, an eval graph."""
    norm = other = None
    last, reader = _only_reader(graph, node)
    if reader is not None and is_affine(_module(graph, reader)):
        norm = reader
        last, reader = _only_reader(graph, norm)
    if reader is not None and _is_one_of(reader, SUMS) and not reader.kwargs and len(reader.args) == 2:
        added = [each for each in reader.args if each is not last]
        if len(added) == 1 and isinstance(added[0], fx.Node):
            other = added[0]
            last, reader = _only_reader(graph, reader)
    clipped = reader is not None and (
        _is_one_of(reader, CLIPS) or isinstance(_module(graph, reader), nn.ReLU | nn.ReLU6)
    )
    return Surroundings(norm, other, clipped)


def is_affine(module: nn.Module | None) -> bool:
    """Whether a module is a norm that computes with running statistics in eval mode."""
    if not (isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward):
        return isinstance(module, FrozenBatchNorm2d)
    return isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)


def is_per_filter(norm: nn.Module | None, layer: Any, y: Tensor) -> bool:
    """Whether a norm behind a layer with the output `y` has one scale for each filter of it: it works on dimension 1.

    The filters of a linear layer are in its last dimension, those of a convolution without a batch in the first.
    """
    frozen = isinstance(norm, FrozenBatchNorm2d)
    return y.dim() == len(getattr(layer, "kernel_size", ())) + 2 and (y.dim() == 4 or not frozen)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel of a norm in eval mode, float64: ``y · scale + shift``."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is None:
        return scale, -mean * scale
    scale = scale * norm.weight.detach().double()
    return scale, norm.bias.detach().double() - mean * scale


def _only_reader(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The one node that reads `node`, or None, and what it reads: `node`, or a module that passes it on unchanged."""
    while len(node.users) == 1 and "exposed" not in node.meta:
        reader = next(iter(node.users))
        if not isinstance(_module(graph, reader), nn.Identity | nn.Dropout):
            return node, reader
        node = reader
    return node, None


def _is_one_of(node: fx.Node, operations: tuple[object, ...]) -> bool:
    """Whether a node is one of some functions and methods (a module may have the name of a method)."""
    return node.op in ("call_function", "call_method") and node.target in operations


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
