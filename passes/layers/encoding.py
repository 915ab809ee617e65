"""How a layer's structure is written into a state dict: as bytes that describe themselves, never as a pickle.

1. The structure is a JSON object: the version of the format, the group of each filter, and for each group the inputs
   that it keeps as bits, eight to a byte, in hexadecimal.
2. Each half ``h`` of a byte of that text, 0 to 15, is stored as the number ``16 · h + 8``. Code that averages a state
   dict by hand, number by number, is off by one or less where the structures are equal, which changes no half.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passes.errors import InputError
from passes.plan import LayerPlan, LayerShape

FORMAT = 1  # grows when a structure means something that earlier versions of sgfx would read wrongly


def encode(plan: LayerPlan) -> bytes:
    """The structure of a regrouped layer as bytes; `decode` is the way back."""
    if plan.labels is None or plan.keep is None:
        raise InputError(f"a layer that is left alone has no structure: {plan.reason}")
    record = {
        "format": FORMAT,
        "inputs": plan.in_channels,
        "labels": plan.labels.tolist(),
        "keep": [row.tobytes().hex() for row in np.packbits(plan.keep.cpu().numpy(), axis=1)],
        "requested_ratio": plan.requested_ratio,
    }
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
    record = _record(code)
    kind, inputs, filters, kernel = shape
    labels, keep = record["labels"], record["keep"]
    if (len(labels), record["inputs"]) != (filters, inputs):
        raise InputError(
            f"_extra_state is the structure of a layer with {len(labels)} filters and {record['inputs']} inputs, not "
            f"of one with {filters} and {inputs}"
        )
    try:
        bits = np.frombuffer(bytes.fromhex("".join(keep)), np.uint8).reshape(len(keep), -(-inputs // 8))
        return LayerPlan(
            *(kind, inputs, filters, kernel),
            labels=torch.tensor(labels, dtype=torch.int64, device="cpu"),
            keep=torch.from_numpy(np.unpackbits(bits, axis=1, count=inputs).astype(bool)),
            requested_ratio=float(record["requested_ratio"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(error) from error


def _record(code: Any) -> dict[str, Any]:
    try:
        numbers = torch.as_tensor(code).detach().cpu().double().numpy()
        halves = (numbers // 16).astype(np.uint8).reshape(-1, 2)
        record: dict[str, Any] = json.loads((halves[:, 0] * 16 + halves[:, 1]).tobytes())
        version, labels, keep = record["format"], record["labels"], record["keep"]
        if type(version) is int and version > FORMAT:
            raise InputError(
                f"_extra_state was written by a newer sgfx (format {version}; this one reads formats up to {FORMAT}): "
                "upgrade with pip install --upgrade sgfx"
            )
        plain = version == FORMAT and type(record["inputs"]) is int and len(keep) <= len(labels)
        if not plain or not all(type(label) is int for label in labels) or not any(keep):
            raise TypeError("its entries are no numbers of groups and inputs")
    except InputError:
        raise
    except Exception as error:  # arbitrary numbers make the reader raise nearly anything
        raise _damaged(error) from error
    return record


def _damaged(error: Exception) -> InputError:
    return InputError(
        f"_extra_state can't be read ({error}): it is damaged, or was computed with. Average parameters and buffers, "
        "and take extra states as they are"
    )
