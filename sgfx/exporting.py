"""`sgfx.export`: files of plain operations (torch.export, ONNX) that run without the model's class or this package.

What is written is read back and run beside the model before it gets its name: the largest difference is reported, and
a file that computes something else is not written. ONNX files are run in ONNX Runtime.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from passes.comparing import distance, kinds, rounding
from passes.copying import shadow
from passes.errors import InputError
from passes.exportable import give_plain_outputs, make_exportable
from passes.layers.grouped import Form
from passes.layers.surgery import hook_dicts
from passes.plan import plans
from passes.python_names import rename_in_program
from passes.random_state import preserved_random_state
from passes.settings import as_inputs, check_model
from passes.values import mapped, tensors_in
from sgfx.compiler import eliminated
from sgfx.writing import replacing

Inputs: TypeAlias = tuple[Any, ...]
Run: TypeAlias = Callable[[Inputs], list[Tensor]]

DEFAULT_FORM: Form = "dense"  # the faster one in ONNX Runtime: python -m benchmarks.export_forms


@dataclass(frozen=True)
class Exported:
    """What `sgfx.export` wrote, and how far it is from the model.

    Attributes:
        path: the file.
        form: how the regrouped layers are written, ``"dense"`` or ``"blocks"``.
        size: bytes of the file.
        max_difference: largest absolute difference between an output of the file and of the model.
        max_output: largest absolute output of the model, for comparison.
        hooks_left_out: paths of modules whose hooks are not in the file, which holds no Python code.
    """

    path: Path
    form: Form
    size: int
    max_difference: float
    max_output: float
    hooks_left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the terminal."""
        text = (
            f"{self.path}: {self.size / 1e6:.1f} MB, form {self.form!r}, outputs differ by at most "
            f"{self.max_difference:.1e} (largest output {self.max_output:.1e})"
        )
        left_out = ", ".join(map(repr, self.hooks_left_out))
        return f"{text}; without the hooks of {left_out}" if left_out else text


def export(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple[object, ...],
    *,
    form: Form | None = None,
    dynamic_batch: bool = False,
) -> Exported:
    """Write a model as a self-contained program, in eval mode, on the CPU: ``.pt2`` (torch.export) or ``.onnx``.

    Args:
        small: a compiled model, or any other but a frozen one. It is neither run nor changed. Hooks are not exported;
            dataclasses among the outputs become dicts, and named tuples tuples.
        path: the file; its suffix chooses the format. ``torch.export.load(path).module()`` runs the one, any ONNX
            runtime the other (``pip install 'sgfx[onnx]'`` to write it).
        example_inputs: a tensor or a tuple of positional arguments.
        form: ``"dense"`` (zeros in place of pruned weights, the library's speed) or ``"blocks"`` (a small file, the
            paper's deployment); None means the one that is faster in ONNX Runtime.
        dynamic_batch: let the first dimension vary, of all inputs that have as many rows as the first tensor.

    Returns:
        What was written, with the largest difference between its outputs and the model's.

    Raises:
        InputError: the model can't be exported, or the file computes something else than the model.
        FileNotFoundError: there is no such folder.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path} must end in .pt2 (torch.export) or .onnx, to say which format is meant")
    if form not in (None, "dense", "blocks"):
        raise InputError(f"form must be 'dense', 'blocks' or None, not {form!r}")
    check_model(small)
    given = as_inputs(example_inputs)
    if given is None:
        raise TypeError("example_inputs must be a tensor or a tuple of positional arguments, not None")
    with preserved_random_state(), torch.no_grad():
        model = copy.deepcopy(shadow(small)).cpu().requires_grad_(False).eval()
        inputs = mapped(given, lambda x: x.detach().cpu().clone())
        batches = _batches(inputs) if dynamic_batch else [inputs]
        expected = [_outputs(model, batch) for batch in batches]
        if plans(model):  # what nobody reads is not worth a place in a file
            eliminated(model, inputs)
        make_exportable(model, form or DEFAULT_FORM)
        give_plain_outputs(model)
        program = _program(model, batches[0], dynamic_batch)
        with replacing(path) as temporary:
            run = _FORMATS[suffix](program, temporary)
            size = temporary.stat().st_size
            compared = [_compare(run(batch), outputs, path) for batch, outputs in zip(batches, expected, strict=True)]
    difference, largest = max(each[0] for each in compared), max(each[1] for each in compared)
    return Exported(Path(path), form or DEFAULT_FORM, size, difference, largest, _hooked(small))


def _hooked(model: nn.Module) -> tuple[str, ...]:
    forward = ("_forward_hooks", "_forward_pre_hooks")
    return tuple(
        path
        for path, module in model.named_modules()
        if any(module.__dict__[key] for key in hook_dicts(module) if key in forward)
    )


def _batches(inputs: Inputs) -> list[Inputs]:
    """Inputs of three batch sizes: first those to export from, of at least 2 rows (1 would be taken for a constant)."""
    rows = next((len(x) for x in tensors_in(inputs) if x.dim()), 0)
    if not rows:
        raise InputError("dynamic_batch needs an example input whose first dimension is the batch")

    def times(inputs: Inputs, count: int) -> Inputs:
        return mapped(inputs, lambda x: torch.cat([x] * count) if _is_batch(x, rows) else x)

    one = mapped(inputs, lambda x: x[:1] if _is_batch(x, rows) else x)
    return [inputs if rows > 1 else times(inputs, 2), one, times(inputs, 3)]


def _is_batch(x: object, rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows


def _outputs(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The tensors among the outputs, in order."""
    try:
        outputs = model(*mapped(inputs, Tensor.clone))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
        raise InputError(f"example_inputs of shape {shapes} do not fit the model in eval mode: {error}") from error
    return tensors_in(outputs)


def _program(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> ExportedProgram:
    shapes = None
    if dynamic_batch:
        batch = Dim("batch")
        rows = next(len(x) for x in tensors_in(inputs) if x.dim())
        shapes = pytree.tree_map(lambda x: {0: batch} if _is_batch(x, rows) else None, inputs)
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"torch.export can't export {type(model).__name__}: {why}\nExport a part of it, such as model.backbone"
            + (", or leave dynamic_batch out" if dynamic_batch else "")
        ) from error
    rename_in_program(program)
    foreign = set()
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # places on this machine
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
                foreign.add(str(node.target))
    if foreign:
        raise InputError(f"{type(model).__name__} needs operations that torch alone does not have: {sorted(foreign)}")
    return program


def _write_pt2(program: ExportedProgram, file: Path) -> Run:
    content = io.BytesIO()  # on a full disk torch's own writer of files ends the process
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    module = torch.export.load(file).module()
    return lambda inputs: _outputs(module, inputs)


def _write_onnx(program: ExportedProgram, file: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"writing ONNX needs {error.name}: pip install 'sgfx[onnx]'") from error
    try:
        made = torch.onnx.export(program, (), dynamo=True, verbose=False, external_data=False)
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"torch.onnx can't convert the model: {why}") from error
    assert made is not None
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in made.model.graph.all_nodes() if node.domain})
    if foreign:
        raise InputError(f"the model needs operations that ONNX does not have: {foreign}")
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # classes, and places on this machine
    made.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        tensors = [x.numpy() for x in tensors_in(inputs)]
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


_FORMATS: dict[str, Callable[[ExportedProgram, Path], Run]] = {".pt2": _write_pt2, ".onnx": _write_onnx}


def _compare(actual: list[Tensor], expected: list[Tensor], path: str | os.PathLike[str]) -> tuple[float, float]:
    """Largest absolute difference and largest absolute output; refuse what is no mere rounding."""
    if kinds(actual) != kinds(expected):
        raise InputError(f"{path} was not written: its outputs are {kinds(actual)}, the model's {kinds(expected)}")
    if not expected:
        raise InputError(f"{path} was not written: the model's outputs hold no tensors")
    difference = largest = 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        worst, most = distance(mine, theirs)
        if worst > rounding(theirs.dtype) * most:
            raise InputError(
                f"{path} was not written: an output differs from the model's by {worst:.1e}, where the largest is "
                f"{most:.1e}. Does the model compute at random in eval mode?"
            )
        difference, largest = max(difference, worst), max(largest, most)
    return difference, largest
