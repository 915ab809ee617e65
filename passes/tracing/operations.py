"""What sums and activations look like in a graph: operator, function, method or module, in place or not."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from passes.layers.known.activations import BY_CALL, BY_MODULE
from passes.layers.known.as_torch_made_it import is_as_torch_made_it

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_")
_NOTHING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None if it calls none."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def passes_on(module: nn.Module | None) -> bool:
    """Whether a module of an eval graph gives what it gets: identity, or dropout that is off."""
    if module is None or type(module) not in _NOTHING or not is_as_torch_made_it(module):
        return False
    return type(module) is nn.Identity or not module.training  # some dropouts refuse to leave train mode


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds its two arguments. A module is what its class says, whatever its name."""
    called = node.op in ("call_function", "call_method") and node.target in _SUMS
    return called and len(node.args) == 2 and not node.kwargs


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies its two arguments."""
    called = node.op in ("call_function", "call_method") and node.target in _PRODUCTS
    return called and len(node.args) == 2 and not node.kwargs


def activation_of(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the activation that a node is (`passes.layers.known.activations`), or None."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return BY_MODULE.get(type(module)) if is_as_torch_made_it(module) else None
    return BY_CALL.get(node.target) if node.op in ("call_function", "call_method") else None
