"""The masked model that a regrouped one stands for, made from its layer plans, cuts and present parameters alone.

A small model's tensors hold some rows of the dense model's, where a row is one (filter, input) pair, or one channel of
a bias or norm. The packed rows of a grouped layer lie group after group, filter after filter, inputs ascending; what
belongs where follows from ``labels``, ``keep`` and what was cut. Nothing here goes through the grouped layers' own
indices, their dense weight or the masked layers: this is the other side of a comparison with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.layers.channel_cut import Cut, cut_of, is_depthwise
from passes.layers.custom import is_custom
from passes.layers.plan import LayerPlan, plan_of
from passes.models.copying import unhooked_copy
from passes.models.record import transient


def kept_rows(shape: Sequence[int], plan: LayerPlan | None, cut: Cut) -> Tensor:
    """Which rows of a dense tensor are there in the small model, in the small model's order.

    Args:
        shape: of the dense tensor, ``[C_out, C_in, …]`` or ``[C]``.
        plan: of the layer, in the dense numbering; None for a norm, or a layer that is in no plan.
        cut: which channels remain.

    Returns:
        int64 ``[rows]``, numbers of the rows of the dense tensor as `as_rows` has them.
    """
    rows = torch.arange(math.prod(shape[:2])).view(tuple(shape[:2]))
    if not shape:
        return rows.view(1)
    outputs = torch.arange(shape[0]) if cut.outputs is None else cut.outputs
    if len(shape) == 1:
        return rows[outputs]
    inputs = torch.arange(shape[1]) if cut.inputs is None else cut.inputs
    if plan is None or plan.labels is None or plan.keep is None:
        return rows[outputs][:, inputs].flatten()
    blocks = [
        rows[outputs[plan.labels[outputs] == group]][:, inputs[keep[inputs]]] for group, keep in enumerate(plan.keep)
    ]
    return torch.cat([block.flatten() for block in blocks])


def as_rows(dense: Tensor) -> Tensor:
    """A view of a dense tensor as rows: ``[C_out·C_in, …]``, ``[C]`` or ``[1]``."""
    return dense.flatten(0, 1) if dense.dim() > 1 else dense.reshape(-1)


def rows_by_name(dense: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """For each parameter and buffer of `dense` by its name: which of its rows `small` has, in order."""
    found = {}
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        module = _module(small, name.rpartition(".")[0])
        plan, cut = (None, Cut()) if module is None else (plan_of(module), cut_of(module))
        owner = dense.get_submodule(name.rpartition(".")[0])
        if is_depthwise(owner):
            cut = Cut(cut.outputs)  # the second dimension of its weight is 1, and stays
        if is_custom(owner) and name.rpartition(".")[2] not in ("weight", "bias"):
            cut = Cut()  # what else it holds is whole
        is_weight = name.rpartition(".")[2] == "weight"
        found[name] = kept_rows(tensor.shape, plan if is_weight else None, cut)
    return found


def masked_reference(dense: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of `dense`, without hooks, filled with the parameters and buffers that `small` has now.

    A pruned weight is 0. A channel that was eliminated keeps what `dense` has there, since nobody reads it.

    Raises:
        InputError: the two do not belong together; names the tensor.
    """
    reference = unhooked_copy(dense)
    theirs, caches = dict([*small.named_parameters(), *small.named_buffers()]), transient(reference)
    rows = rows_by_name(dense, small)
    for name, mine in [*reference.named_parameters(), *reference.named_buffers()]:
        plan = plan_of(_module(small, name.rpartition(".")[0]) or small)
        masked = name.rpartition(".")[2] == "weight" and plan is not None and plan.grouped
        given = theirs.get(name)
        if given is not None and given.numel() == as_rows(mine)[rows[name]].numel():
            filled = torch.zeros(mine.shape, dtype=given.dtype, device=mine.device)  # contiguous, whatever `mine` is
            if not masked:
                filled.copy_(mine.detach())
            as_rows(filled)[rows[name]] = given.detach().reshape(-1, *mine.shape[2:])
            mine.data = torch.empty_like(mine, dtype=given.dtype).copy_(filled)
        elif name not in caches:
            raise InputError(f"small is no compiled form of dense: {name!r} of dense is not in small, or differs there")
    return reference


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
