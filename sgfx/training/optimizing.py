"""The optimizer of a run: stochastic gradient descent with momentum, or one of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.optim import SGD, Optimizer

from passes.errors import InputError

# From groups of parameters and `lr`, as torch's own classes are called.
MakeOptimizer: TypeAlias = Callable[..., Optimizer]
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained.

    Raises:
        InputError: that is nothing.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("the model has nothing to train: no parameter with requires_grad=True; set it on some")
    return trained


def parameter_groups(model: nn.Module, weight_decay: float, decay_norms: bool) -> list[dict[str, Any]]:
    """The trained parameters with their weight decay, in one group, or in two where norms and biases have none.

    A norm's parameters, and all of one dimension, count as norms and biases.
    """
    trained = trained_parameters(model)
    if decay_norms:
        return [{"params": trained, "weight_decay": weight_decay}]
    norms = {id(x) for module in model.modules() if isinstance(module, _NORMS) for x in module.parameters(False)}
    free = {id(x) for x in trained if x.dim() <= 1 or id(x) in norms}
    groups = [
        {"params": [x for x in trained if id(x) not in free], "weight_decay": weight_decay},
        {"params": [x for x in trained if id(x) in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, make: MakeOptimizer | None, lr: float, momentum: float, weight_decay: float, decay_norms: bool
) -> Optimizer:
    """The optimizer of a model.

    Raises:
        InputError: there is nothing to train.
        TypeError: `make` gives no optimizer.
    """
    groups = parameter_groups(model, weight_decay, decay_norms)
    if make is None:
        return SGD(groups, lr=lr, momentum=momentum)
    optimizer = make(groups, lr=lr)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must give a torch.optim.Optimizer, not {type(optimizer).__name__}")
    return optimizer
