"""The peer: channel pruning by Torch-Pruning, at a given share of MACs, with batch norms re-estimated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgfx.reporting.counting import count_macs


def pruned_channels(
    model: nn.Module, share: float, inputs: Tensor, labels: Tensor | None = None
) -> tuple[nn.Module, float]:
    """Prune the inner channels of a ResNet's blocks until `share` of the MACs is left, or just more than that.

    Others can't be pruned: it fails on the option A shortcuts.

    Args:
        model: a `ResNetCifar`.
        share: the share of MACs that remains.
        inputs: images ``[N, 3, 32, 32]``; the first is also the example.
        labels: classes of them for first-order Taylor importance; None prunes by the L1 norm.

    Returns:
        The pruned copy, and the share of MACs that is really left.
    """
    low, high = 0.0, 0.98
    dense = count_macs(model, (inputs[:1],))[""]
    least, remaining = copy.deepcopy(model), 1.0
    for _ in range(7):
        ratio = (low + high) / 2
        small = _pruned(model, ratio, inputs, labels)
        left = count_macs(small, (inputs[:1],))[""] / dense
        if left < share:
            high = ratio
        else:
            low, least, remaining = ratio, small, left
    return least, remaining


def pruned_everywhere(model: nn.Module, share: float, inputs: Tensor) -> tuple[nn.Module, float]:
    """Prune all channels that the peer can prune, by their L1 norm, until `share` of the MACs is left within 2 %.

    Args:
        model: a network whose linear layers are its heads: their outputs stay.
        share: the share of MACs that remains.
        inputs: an example.

    Returns:
        The pruned copy, and the share of MACs that is really left.
    """
    dense = count_macs(model, (inputs,))[""]
    kept = share**0.5  # of the channels: a layer's MACs are about the square
    for _ in range(6):
        small = _pruned_by_norm(model, 1 - kept, inputs)
        left = count_macs(small, (inputs,))[""] / dense
        if abs(left / share - 1) < 0.02:
            break
        kept *= (share / left) ** 0.5
    return small, left


def _pruned_by_norm(model: nn.Module, ratio: float, inputs: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning as tp

        twin = copy.deepcopy(model)
        heads = [module for module in twin.modules() if isinstance(module, nn.Linear)]
        importance = tp.importance.MagnitudeImportance(p=1)
        tp.pruner.MagnitudePruner(twin, inputs, importance=importance, pruning_ratio=ratio, ignored_layers=heads).step()
    return twin


def _pruned(model: nn.Module, ratio: float, inputs: Tensor, labels: Tensor | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning as tp

        twin = copy.deepcopy(model)
        importance = tp.importance.MagnitudeImportance(p=1) if labels is None else tp.importance.TaylorImportance()
        inner = [module for path, module in twin.named_modules() if path.endswith(".conv1")]
        pruner = tp.pruner.MagnitudePruner(
            twin,
            inputs[:1],
            importance=importance,
            pruning_ratio=0.0,
            pruning_ratio_dict=dict.fromkeys(inner, ratio),
            ignored_layers=[m for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner],
        )
        if labels is not None:
            F.cross_entropy(twin(inputs), labels).backward()  # type: ignore[no-untyped-call]
        pruner.step()
        twin.zero_grad()
    return twin


def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Estimate the running statistics of all batch norms anew, as the mean over `batches`, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
