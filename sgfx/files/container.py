"""The container of `sgfx.save`'s files: safetensors, with the structure of a model as JSON metadata and a checksum.

The metadata has one entry, ``"sgfx"``: a JSON object with the version of the format, the structure of the model
(`models.record`) and a SHA-256 sum over that structure and all tensors. The sum tells an altered file from a whole
one; it is no signature, and says nothing of who wrote the file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.models import Record, describe, named_tensors

FORMAT = 2  # grows when a file means something that earlier versions of sgfx would read wrongly
ANEW = "Make a fresh dense model of the class and options that the file was saved from"
_KEY = "sgfx"


def packed(structure: Record, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The metadata of a file with these tensors."""
    return {_KEY: _json({"format": FORMAT, "checksum": checksum(structure, tensors), **structure})}


def brief(value: object) -> str:
    """What a message shows of a value from a file."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def checksum(structure: Record, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a structure and all tensors, their names, types and shapes."""
    total = hashlib.sha256(_json(structure).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def unpacked(file: Path, content: bytes) -> tuple[Record | None, dict[str, Tensor]]:
    """Check a safetensors file for itself: its structure, if `save` wrote it, and its tensors."""
    from safetensors.torch import load as tensors_in

    try:
        tensors = tensors_in(content)  # checks the header too
        metadata = json.loads(_header(content)).get("__metadata__", {})
    except Exception as error:  # arbitrary bytes make the reader raise nearly anything
        let_memory_errors_pass(error)
        raise InputError(
            f"{file} is truncated, damaged or no safetensors file ({error}); copy it again, or save it anew"
        ) from error
    if _KEY not in metadata:
        return None, tensors
    structure = _structure(file, metadata[_KEY])
    given = structure.pop("checksum", None)
    try:
        known = given == checksum(structure, tensors)
    except RecursionError:  # nested deeper than it can be written, though not than it can be read
        known = False
    if not known:
        raise InputError(f"{file} was altered after sgfx.save wrote it: its checksum differs; copy it again")
    return structure, tensors


def holds_compiled(file: Path) -> bool:
    """Whether `sgfx.save` wrote a file, by its header; False where it can't be read."""
    try:
        with file.open("rb") as opened:
            length, first = int.from_bytes(opened.read(8), "little"), opened.read(1)
            header = first + opened.read(min(length, 1 << 26) - 1) if first == b"{" else b"{}"
            return _KEY in json.loads(header).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_size(file: Path, content: bytes, model: nn.Module) -> None:
    """Refuse a header that tells of far more groups, modules or tensors than `model` has, before it is parsed."""
    header = _header(content)
    tensors = named_tensors(model).values()
    filters = sum(len(tensor) for tensor in tensors if tensor.dim())
    own = describe(model)
    most = 200_000 + filters + 2 * _brackets(_json(own).encode()) + 50 * len(own["modules"]) + 10 * len(tensors)
    if header.startswith(b"{") and (found := _brackets(header)) > most:
        raise InputError(
            f"{file} does not fit {type(model).__name__}: its structure has {found} lists and objects (groups, "
            f"modules, tensors), more than a model of {filters} filters can have. {ANEW}"
        )


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _structure(file: Path, text: str) -> Record:
    try:
        structure = json.loads(text)
        version = structure.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: its structure can't be read ({error}); copy it again") from error
    if type(version) is not int or version < 1:
        raise InputError(f"{file} is damaged: it says that its format is {version!r}; copy it again")
    if version > FORMAT:
        raise InputError(
            f"{file} was written by a newer sgfx (format {version}; this one reads formats up to {FORMAT}): "
            "upgrade with pip install --upgrade sgfx"
        )
    return dict(structure)
