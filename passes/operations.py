"""What sums and activations look like in a graph: operator, function, method or module, in place or not."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
_ACTIVATION_CALLS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.hardswish: "hardswish", F.silu: "silu",
}  # fmt: skip


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None if it calls none."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds its two arguments. A module is what its class says, whatever its name."""
    called = node.op in ("call_function", "call_method") and node.target in _SUMS
    return called and len(node.args) == 2 and not node.kwargs


def activation_of(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the activation that a node is, or None: relu, relu6, hardswish or silu."""
    if node.op == "call_module":
        return _ACTIVATION_MODULES.get(type(module_of(graph, node)))  # type: ignore[arg-type]
    return _ACTIVATION_CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
