"""The masked model that a regrouped one stands for, made from its layer plans and present parameters alone.

The packed rows of a grouped layer lie group after group, filter after filter, inputs ascending (`passes.layers.grouped`
says so); what belongs where follows from ``labels`` and ``keep``. Nothing here goes through the grouped layers' own
indices, their dense weight or the masked layers: this is the other side of a comparison with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from passes.copying import shadow
from passes.errors import InputError
from passes.plan import LayerPlan, plans
from passes.structure import transient


def scatter(rows: Tensor, plan: LayerPlan) -> Tensor:
    """Packed rows ``[connections, *kernel]`` as a dense weight ``[C_out, C_in, *kernel]``, 0 where pruned."""
    dense = rows.new_zeros(plan.out_channels, plan.in_channels, *plan.kernel_size)
    start = 0
    for filters, inputs in _blocks(plan):
        end = start + len(filters) * len(inputs)
        block = rows[start:end].reshape(len(filters), len(inputs), *plan.kernel_size)
        dense[filters[:, None], inputs[None, :]] = block
        start = end
    return dense


def gather(dense: Tensor, plan: LayerPlan) -> Tensor:
    """The rows ``[connections, *kernel]`` of a dense weight that the plan keeps, in packed order."""
    return torch.cat([dense[f[:, None], i[None, :]].flatten(0, 1) for f, i in _blocks(plan)])


def _blocks(plan: LayerPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Filters and inputs of each group."""
    if plan.labels is None or plan.keep is None:
        raise InputError("a layer that was left alone has no groups")
    for group, keep in enumerate(plan.keep):
        yield (plan.labels == group).nonzero()[:, 0], keep.nonzero()[:, 0]


def masked_reference(dense: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of `dense`, without hooks, filled with the parameters and buffers that `small` has now.

    Raises:
        InputError: the two do not belong together; names the tensor.
    """
    reference = shadow(dense)
    values = {
        id(tensor): nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for tensor, value in _values(reference, small)
    }
    for module in reference.modules():
        registries: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for registry in registries:
            registry.update({key: values[id(each)] for key, each in registry.items() if id(each) in values})
    return reference


def _values(reference: nn.Module, small: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the reference, and what `small` has in its place."""
    found = plans(small)
    theirs = dict([*small.named_parameters(), *small.named_buffers()])
    caches = transient(reference)
    for name, mine in [*reference.named_parameters(), *reference.named_buffers()]:
        path, _, kind = name.rpartition(".")
        plan = found.get(path)
        value = theirs[name].detach() if name in theirs else None
        if value is not None and kind == "weight" and plan is not None and plan.grouped:
            rows = value if plan.kernel_size else value[:, 0]
            value = scatter(rows, plan) if len(rows) == plan.connections else None
        if value is not None and value.shape == mine.shape:
            yield mine, value.clone()
        elif name not in caches:
            raise InputError(f"small is no compiled form of dense: {name!r} of dense is not in small, or differs there")
