"""How a layer's structure is written into a state dict: as bytes that describe themselves, never as a pickle.

1. The structure is a JSON object: the version of the format, the group of each filter, and for each group the inputs
   that it keeps as bits, eight to a byte, in hexadecimal.
2. Each half ``h`` of a byte of that text, 0 to 15, is stored as the number ``16 · h + 8``. Code that averages a state
   dict by hand, number by number, is off by one or less where the structures are equal, which changes no half.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from passes.errors import InputError
from passes.layers.plan import LayerPlan, LayerShape

Sides: TypeAlias = tuple[Tensor | None, Tensor | None]  # of a layer: its filters and its inputs
FORMAT = 1  # grows when a structure means something that earlier versions of sgfx would read wrongly


def encode(plan: LayerPlan, whole: LayerPlan | None = None, remaining: Sides = (None, None)) -> bytes:
    """The structure of a regrouped layer as bytes; `decode` and `decode_whole` are the ways back.

    Args:
        plan: in the numbering of the channels that the layer has.
        whole: in the dense numbering, where channels were eliminated.
        remaining: which filters and inputs of it remain, int64, ascending; None: all.
    """
    record = {"format": FORMAT, **_fields(plan)}
    if whole is not None:
        outputs, inputs = (None if side is None else side.tolist() for side in remaining)
        record["whole"] = {**_fields(whole), "remaining": [outputs, inputs]}
    text = np.frombuffer(json.dumps(record, separators=(",", ":")).encode(), np.uint8)
    halves = np.stack([text >> 4, text & 15], 1)
    return (16 * halves + 8).tobytes()


def as_tensor(code: bytes) -> Tensor:
    """An encoded structure as a new tensor, uint8 ``[numbers]``, on the CPU."""
    return torch.from_numpy(np.frombuffer(code, np.uint8).copy())


def decode(code: Any, shape: LayerShape) -> LayerPlan:
    """Read the structure of a layer of this `shape` from its encoded form.

    Raises:
        InputError: it is no encoded structure, a newer one, or one of a layer with other channels.
    """
    return _plan(_record(code), shape)


def decode_whole(code: Any, shape: LayerShape) -> tuple[LayerPlan, list[Any]]:
    """Read the structure of a dense layer of this `shape`: its plan, and what it says of the channels that remain.

    Returns:
        The plan in the dense numbering, and two entries for filters and inputs, unchecked: None means all.

    Raises:
        InputError: as `decode`.
    """
    record = _record(code)
    whole = record.get("whole", {**record, "remaining": [None, None]})
    plan = _plan(whole, shape)
    remaining = whole.get("remaining")
    if not isinstance(remaining, list) or len(remaining) != 2:
        raise _damaged("it doesn't say what remains")
    return plan, remaining


def _fields(plan: LayerPlan) -> dict[str, Any]:
    if plan.labels is None or plan.keep is None:
        raise InputError(f"a layer that is left alone has no structure: {plan.reason}")
    return {
        "inputs": plan.in_channels,
        "labels": plan.labels.tolist(),
        "keep": [row.tobytes().hex() for row in np.packbits(plan.keep.cpu().numpy(), axis=1)],
        "requested_ratio": plan.requested_ratio,
    }


def _plan(fields: Any, shape: LayerShape) -> LayerPlan:
    kind, inputs, filters, kernel = shape
    try:
        labels, keep, of_inputs = fields["labels"], fields["keep"], fields["inputs"]
        if not all(type(number) is int for number in [*labels, of_inputs]) or not 0 < len(keep) <= len(labels):
            raise TypeError("its entries are no numbers of groups and inputs")
    except (TypeError, KeyError) as error:
        raise _damaged(error) from error
    if (len(labels), of_inputs) != (filters, inputs):
        raise InputError(
            f"_extra_state is the structure of a layer with {len(labels)} filters and {of_inputs} inputs, not of one "
            f"with {filters} and {inputs}"
        )
    try:
        bits = np.frombuffer(bytes.fromhex("".join(keep)), np.uint8).reshape(len(keep), -(-inputs // 8))
        return LayerPlan(
            *(kind, inputs, filters, kernel),
            labels=torch.tensor(labels, dtype=torch.int64, device="cpu"),
            keep=torch.from_numpy(np.unpackbits(bits, axis=1, count=inputs).astype(bool)),
            requested_ratio=float(fields["requested_ratio"]),
        )
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise _damaged(error) from error


def _record(code: Any) -> dict[str, Any]:
    try:
        numbers = torch.as_tensor(code).detach().cpu().double().numpy()
        halves = (numbers // 16).astype(np.uint8).reshape(-1, 2)
        record: dict[str, Any] = json.loads((halves[:, 0] * 16 + halves[:, 1]).tobytes())
        version = record["format"]
        if type(version) is not int or version < 1:
            raise TypeError(f"its format is {version!r}")
    except Exception as error:  # arbitrary numbers make the reader raise nearly anything
        raise _damaged(error) from error
    if version > FORMAT:
        raise InputError(
            f"_extra_state was written by a newer sgfx (format {version}; this one reads formats up to {FORMAT}): "
            "upgrade with pip install --upgrade sgfx"
        )
    return record


def _damaged(error: object) -> InputError:
    return InputError(
        f"_extra_state can't be read ({error}): it is damaged, or was computed with. Average parameters and buffers, "
        "and take extra states as they are"
    )
