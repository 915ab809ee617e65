"""Examples without labels, as calibration and distillation take them: checked, and cut into batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.errors import InputError

BATCH = 32  # examples: large enough to keep the cores busy, small enough for memory


def read_examples(data: Any, name: str) -> list[Any]:
    """Read `data` once and return the inputs of its batches.

    Args:
        data: a tensor ``[N, …]`` of examples, or an iterable of batches; a batch is a tensor, or a tuple or list whose
            first element is the input (whatever follows, such as labels, is not looked at).
        name: what the caller calls it, for messages.

    Returns:
        Inputs of the model; tensors are cut into batches of at most 32 examples.

    Raises:
        InputError: there are none, or one holds NaN or infinite values.
        TypeError: it is neither a tensor nor an iterable of batches.
    """
    if not isinstance(data, Tensor) and (not isinstance(data, Iterable) or isinstance(data, Mapping | str)):
        raise TypeError(
            f"{name} must be a tensor of examples [N, …] or an iterable of batches, not {type(data).__name__}"
        )
    if isinstance(data, Tensor) and data.dim() == 0:
        raise InputError(f"{name} is a single number: give a tensor of examples [N, …]")
    batches: list[Any] = []
    for number, batch in enumerate([data] if isinstance(data, Tensor) else data, 1):
        inputs = _inputs(batch, name, number)
        batches += torch.split(inputs, BATCH) if isinstance(inputs, Tensor) else [inputs]
    if not batches or not sum(map(example_count, batches)):
        raise InputError(
            f"{name} gave no examples: is the dataset empty, or was it an iterator that had been used up before?"
        )
    return batches


def example_count(inputs: Any) -> int:
    """Number of examples of a batch."""
    return len(inputs) if isinstance(inputs, Tensor | list | tuple) else 1


def _inputs(batch: Any, name: str, number: int) -> Any:
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.dim() == 0 for tensor in tensors):
        raise TypeError(
            f"{name} must give batches that are tensors, or tuples or lists with the input first; batch {number} is a "
            f"{type(batch).__name__}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(f"batch {number} of {name} holds NaN or infinite values: leave these examples out")
    return inputs.detach() if isinstance(inputs, Tensor) else inputs
