"""The folder of a run: ``last.pt``, the checkpoint; ``best.pt``, the best weights; ``log.csv``, a row for each epoch.

A file is whole or not there, and takes the place of the one before in one step: whoever ends the process at whatever
moment finds the last checkpoint. Files are plain data, read with ``weights_only=True``.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from passes.errors import InputError, let_memory_errors_pass
from sgfx.files.writing import replacing

FORMAT = 1  # grows when a checkpoint means something that earlier versions would read wrongly
_LEFT_OVER = re.compile(r"\.[0-9a-f]{32}\.(pt|csv|safetensors)")  # what `replacing` leaves where it is killed


class RunFolder:
    """Paths, and how they are read and written.

    Attributes:
        last: the checkpoint, ``last.pt``: what `Trainer.fit` goes on from. Its weights lie under ``"model"``.
        best: ``best.pt``, weights alone: ``{"model": state dict, "epoch": …, "top1": …}``.
        log: ``log.csv``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take the path; nothing is made yet."""
        self.path = Path(path)
        self.last, self.best, self.log = (self.path / name for name in ("last.pt", "best.pt", "log.csv"))

    def check(self, resume: bool) -> None:
        """Refuse to begin anew where there is a run already.

        Raises:
            InputError: there is, or the path is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give the path of a folder")
        if self.last.exists() and not resume:
            raise InputError(f"{self.path} holds a run already: go on with resume=True, or give another folder")

    def make(self) -> None:
        """Make the folder, and take away what a killed process left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.path.iterdir():
            if _LEFT_OVER.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The checkpoint, or None where there is none yet.

        Raises:
            InputError: it is damaged, no checkpoint, or of a newer sgfx.
        """
        return read_plain(self.last, "checkpoint") if self.last.exists() else None

    def write_log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the log anew: all rows, columns in the order in which they come up."""
        write_csv(self.log, rows)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV, in one step."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def write_plain(path: Path, kind: str, content: Mapping[str, Any], *, tried: bool = True) -> None:
    """Write tensors and plain data with ``torch.save``, in one step.

    Args:
        path: the file.
        kind: what it is, for `read_plain`.
        content: what is in it.
        tried: whether such content could be read before; if not, it is read once, before it gets its name.

    Raises:
        InputError: it could not be read again: it is more than tensors and plain data.
        OSError: the disk is full or the like; an earlier file is as it was.
    """
    buffer = io.BytesIO()  # torch's own writer would not say that a disk is full
    torch.save({"sgfx": kind, "format": FORMAT, **content}, buffer)
    if not tried:
        try:
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True, map_location="cpu")
        except Exception as error:  # whatever its reader stumbles over
            let_memory_errors_pass(error)
            needed = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise InputError(
                f"{path} would hold more than tensors and plain data ({needed[1] if needed else error}): the state of "
                "the model, and of an optimizer of your own, must be made of these"
            ) from error
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_plain(path: Path, kind: str) -> dict[str, Any]:
    """Read what `write_plain` wrote; nothing is unpickled.

    Raises:
        InputError: it is damaged, of another kind, or of a newer sgfx.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # arbitrary bytes make the reader raise nearly anything
        let_memory_errors_pass(error)
        raise InputError(
            f"{path} is damaged, or no {kind} ({type(error).__name__}); take it away to begin anew, or bring back a "
            "copy"
        ) from error
    if not isinstance(content, dict) or content.get("sgfx") != kind:
        raise InputError(f"{path} is no {kind} that sgfx wrote; give another folder")
    if not isinstance(version := content.get("format"), int):
        raise InputError(f"{path} is damaged: it says that its format is {version!r}; bring back a copy")
    if version > FORMAT:
        raise InputError(
            f"{path} was written by a newer sgfx (format {version}; this one reads {FORMAT}): upgrade with "
            "pip install --upgrade sgfx"
        )
    return content
