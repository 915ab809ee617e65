"""The formats of `sgfx.export`: programs of torch.export as ``.pt2`` or ``.onnx`` files, and what runs them again."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram

from passes.errors import InputError, let_memory_errors_pass
from passes.models import tensors_in
from passes.options import checked_integer

Run: TypeAlias = Callable[[tuple[Any, ...]], list[Tensor]]


@dataclass(frozen=True)
class OnnxOptions:
    """Arguments of `sgfx.export` by the same names; only ONNX files have names and an opset.

    `dynamic_shapes` are for every format, and give names to the axes of ONNX files.
    """

    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_shapes: Any = None

    def check(self, suffix: str) -> None:
        """Refuse values of the wrong type, and any for another format."""
        if not isinstance(self.dynamic_shapes, Mapping | tuple | list | None):
            raise TypeError(
                f"dynamic_shapes must be a tuple or dict with an entry for each input, not {self.dynamic_shapes!r}"
            )
        options = {"opset": self.opset, "input_names": self.input_names, "output_names": self.output_names}
        given = [name for name, value in options.items() if value is not None]
        if given and suffix != ".onnx":
            raise InputError(f"{' and '.join(given)} are for .onnx files: a {suffix} file has none. Leave them out")
        if self.opset is not None:
            checked_integer(self.opset, "opset", least=1)
        for option in ("input_names", "output_names"):
            names = options[option]
            strings = isinstance(names, Sequence) and all(isinstance(name, str) and name for name in names)
            if names is not None and (isinstance(names, str) or not strings):
                raise TypeError(f"{option} must be a list of names, not {names!r}")
        names = [*(self.input_names or ()), *(self.output_names or ())]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"input_names and output_names hold {twice!r} twice: each needs a name of its own")

    def check_counts(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Refuse names that are more or less than the tensors that a model takes and gives."""
        for option, names, tensors in (
            ("input_names", self.input_names, inputs),
            ("output_names", self.output_names, outputs),
        ):
            if names is not None and len(names) != len(tensors):
                kind = option.partition("_")[0]
                raise InputError(f"{option} has {len(names)} names for {len(tensors)} {kind} tensors: {list(names)}")


def write_pt2(program: ExportedProgram, file: Path, options: OnnxOptions) -> Run:
    """Write a program as torch.export does, and return what runs the file."""
    content = io.BytesIO()  # on a full disk torch's own writer of files ends the process
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    module = torch.export.load(file).module()
    return lambda inputs: tensors_in(module(*inputs))


def write_onnx(program: ExportedProgram, file: Path, options: OnnxOptions) -> Run:
    """Write a program as ONNX, and return what runs the file in ONNX Runtime."""
    check_installed()
    _converted(program, options).save(file, external_data=False)
    return opened(file)


def check_installed() -> None:
    """Refuse to write ONNX where its libraries are missing."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"writing ONNX needs {error.name}: pip install 'sgfx[onnx]'") from error


def opened(file: Path) -> Run:
    """What runs an ONNX file in ONNX Runtime."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(f"ONNX Runtime can't run what torch.onnx made of the model: {reason_of(error)}") from error
    names = [each.name for each in session.get_inputs()]

    def run(inputs: tuple[Any, ...]) -> list[Tensor]:
        tensors = [x.numpy() for x in tensors_in(inputs)]
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def _converted(program: ExportedProgram, options: OnnxOptions) -> Any:
    try:
        with quiet(), warnings.catch_warnings():
            # Each axis that has the name of another one, as it should, would be warned of.
            warnings.filterwarnings("ignore", r"# The axis name: (\S+) will not be used.* another axis: \1\.")
            made: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=options.opset,
                input_names=options.input_names,
                output_names=options.output_names,
                dynamic_shapes=options.dynamic_shapes,
            )
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(f"torch.onnx can't convert the model: {reason_of(_first_cause(error))}") from error
    graph, opset = made.model.graph, made.model.opset_imports.get("")
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in graph.all_nodes() if node.domain})
    if foreign:
        raise InputError(f"the model needs operations that ONNX does not have: {foreign}")
    if options.opset not in (None, opset):
        raise InputError(f"torch.onnx can't write the model in opset {options.opset}, only in {opset}")
    for node in graph.all_nodes():
        node.metadata_props.clear()  # classes, and places on this machine
    return made


def reason_of(error: BaseException) -> str:
    """What an error says, in one line: its first paragraph, without colours and advice for developers of torch."""
    paragraph = re.sub(r"\x1b\[\d+m", "", str(error)).strip().partition("\n\n")[0]
    paragraph = re.sub(r"For more information[^\n]*", "", paragraph)
    text = " ".join(paragraph.split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]}…"


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """Let this thread's exporting print and log nothing: after a failure torch prints the whole graph."""
    thread = threading.get_ident()

    def from_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    handlers = list(logging.getLogger("torch").handlers)
    for handler in handlers:
        handler.addFilter(from_others)
    try:
        with redirect_stderr(_OthersOnly(sys.stderr, thread)):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(from_others)


class _OthersOnly(io.TextIOBase):
    """A stream that drops what one thread writes."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        """Pass on the text of other threads."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def flush(self) -> None:
        """Flush the stream itself."""
        self._stream.flush()
