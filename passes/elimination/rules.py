"""What operations do with channels: one rule for each kind of operation.

A rule gets the labels of what an operation reads and returns the labels of what it gives. The kinds:

- elementwise: operands are broadcast; slots that meet stay or go together (`tie`);
- local (pooling, resizing, reductions): works along some dimensions; channels that lie in another stay apart;
- moving (reshape, permute, slice, cat, pad, …): done on the labels themselves. Where the arguments count channels (an
  index, a size, a number of them), none can be taken out (`hold`), though it is still known who reads which.

Whatever has no rule reads all that it gets, in places that are not known: all of it is held (`labelling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.elimination.labels import carried, compact, fixed, varying
from passes.elimination.operations import JOINING, RELATIVE


class Notes(Protocol):
    """Where rules note what they find out."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Slots at the same places of two label tensors of one shape stay or go together."""

    def hold(self, labels: Tensor, reason: str) -> None:
        """These channels can't be taken out."""


class NotUnderstoodError(Exception):
    """No rule holds for an operation; its message says why."""


def elementwise(notes: Notes, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Broadcast the labels of `operands` to the result's shape, and tie what meets."""
    result, sizes = compact(fixed(shape)), [1] * len(shape)
    for operand in operands:
        missing = [1] * (len(shape) - operand.dim())
        mine = compact(operand).view(*missing, *compact(operand).shape)
        my_sizes = missing + list(operand.shape)
        if _spread(my_sizes, result):
            notes.hold(mine, "spread over all channels of another tensor")
        elif _spread(sizes, mine):
            notes.hold(result, "spread over all channels of another tensor")
            result = mine
        else:
            notes.tie(*_broadcast(result, mine))
            result = torch.where(result == 0, mine, result)
        sizes = [max(a, b) for a, b in zip(sizes, my_sizes, strict=True)]
    return result.expand(*shape)


def _spread(sizes: Sequence[int], other: Tensor) -> bool:
    """Whether an operand of these sizes has one element where the other has channels."""
    dims = varying(other)
    return bool(dims) and all(sizes[dim] == 1 for dim in dims)


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    return a.expand(shape), b.expand(shape)


def local(labels: Tensor, value: Any, dims: Iterable[int] = ()) -> Any:
    """Labels after an operation that works along `dims` alone; of each tensor, where it gives several."""
    if set(dims) & varying(labels):
        raise NotUnderstoodError("it works along the channels")
    if isinstance(value, tuple | list):
        return tuple(local(labels, each) for each in value)
    moved = carried(labels, value.shape)
    if moved is None:
        raise NotUnderstoodError("it changes the number of channels")
    return moved


def along_others(labels: Tensor, dims: Any) -> list[int]:
    """The dimensions of an operation that works along some, which must not be those of the channels."""
    chosen = [dims] if isinstance(dims, int) else dims
    if not chosen:  # none, or an empty list of them, means all
        raise NotUnderstoodError("it works along all dimensions")
    chosen = [dim % labels.dim() for dim in chosen]
    if set(chosen) & varying(labels):
        raise NotUnderstoodError("it works along the channels")
    return chosen


def reduction(labels: Tensor, dims: Any, keepdim: bool) -> Tensor:
    """Labels after a reduction over other dimensions than the channels'."""
    chosen = sorted(along_others(labels, dims), reverse=True)
    for dim in chosen:
        labels = labels.narrow(dim, 0, 1) if keepdim else labels.select(dim, 0)
    return labels


def moving(notes: Notes, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    """Do a moving operation on the labels, and hold the channels where its arguments count them."""
    if name == "pad":
        return _padded(*args, **kwargs)
    if name in JOINING:
        return _joined(notes, name, *args, **kwargs, reason=reason)
    if name == "expand_as":  # the result has as many channels as what it is spread to
        notes.hold(args[1], reason)
    if isinstance(target, str):
        moved = getattr(args[0], "reshape" if name == "view" else target)(*args[1:], **kwargs)
    else:
        moved = target(*args, **kwargs)
    if name not in RELATIVE and not _leaves_channels_alone(name, args, kwargs, moved):
        notes.hold(args[0], reason)
    return moved


def _padded(labels: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Constants that are padded on are nobody's channels; what repeats channels, or cuts them off, isn't understood."""
    dims, shape = varying(labels), list(labels.shape)
    for index, amount in enumerate(pad):
        shape[-1 - index // 2] += amount
    added = [amount if labels.dim() - 1 - index // 2 in dims else 0 for index, amount in enumerate(pad)]
    if any(added) and (mode != "constant" or min(pad) < 0):
        raise NotUnderstoodError("it pads channels with others, or cuts them off")
    return F.pad(compact(labels), added).expand(*shape)


def _joined(
    notes: Notes, name: str, parts: Sequence[Tensor], dim: int = 0, axis: int | None = None, *, reason: str
) -> Tensor:
    """Parts that are put behind each other have the same channels along all other dimensions, or are held."""
    stacked = name == "stack"
    dim = (dim if axis is None else axis) % (parts[0].dim() + stacked)
    parts = [part.unsqueeze(dim) for part in parts] if stacked else parts
    dims = [varying(part) for part in parts]
    if stacked or not any(dim in along for along in dims):
        if stacked or any(dims):
            for part in parts[1:]:
                notes.tie(*_broadcast(compact(parts[0]), compact(part)))
    elif not all(along <= {dim} for along in dims):
        for part in parts:
            notes.hold(part, reason)
    return _behind_each_other(parts, dim)


def _behind_each_other(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Labels joined along `dim`, with stride 0 along every other dimension that no part varies along."""
    small = [compact(part) for part in parts]
    sizes = [max(each) for each in zip(*(part.shape for part in small), strict=True)]
    shape, count = list(parts[0].shape), sum(part.shape[dim] for part in parts)
    full = [
        each.expand(*sizes[:dim], part.shape[dim], *sizes[dim + 1 :]) for each, part in zip(small, parts, strict=True)
    ]
    return torch.cat(full, dim).expand(*shape[:dim], count, *shape[dim + 1 :])


def _leaves_channels_alone(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], moved: Any) -> bool:
    """Whether a moving operation that may count channels does not, with these arguments."""
    labels, *rest = args
    dims = varying(labels)
    if not dims:
        return True
    if name in ("view", "reshape", "expand"):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        after = varying(moved)
        return len(after) == 1 and not kwargs and shape[next(iter(after))] == -1
    if name == "getitem":
        return _takes_all(rest[0], dims, labels.dim())
    place = {"chunk": 1, "split": 1, "tensor_split": 1, "narrow": 0, "select": 0, "index_select": 0, "unbind": 0}
    if name in place:
        dim = rest[place[name]] if len(rest) > place[name] else kwargs.get("dim", 0)
        return dim % labels.dim() not in dims
    return name == "squeeze" and bool(rest or kwargs)


def _takes_all(index: Any, dims: set[int], rank: int) -> bool:
    """Whether an index takes everything along the given dimensions."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(entry, int | slice) or entry is None or entry is Ellipsis for entry in entries):
        return False
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
        entries[place : place + 1] = [slice(None)] * (rank - taken)
    along = [entry for entry in entries if entry is not None]
    return all(dim >= len(along) or along[dim] == slice(None) for dim in dims)
