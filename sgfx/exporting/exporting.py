"""`sgfx.export`: files of plain operations (torch.export, ONNX) that run without the model's class or this package.

What is written is read back and run beside the model before it gets its name: the largest difference is reported, and
a file that computes something else is not written. ONNX files are run in ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from passes.elimination import remove_unread_filters
from passes.errors import InputError, let_memory_errors_pass
from passes.infra import preserved_random_state
from passes.layers import Form, hook_dicts, make_exportable, plans
from passes.models import (
    difference,
    give_plain_outputs,
    is_detector,
    kinds,
    mapped,
    shapes_of,
    tensors_in,
    unhooked_copy,
)
from passes.options import ExampleInputs, as_inputs, by_place_and_name, check_model
from passes.tracing import rename_in_program
from sgfx.exporting.detectors import OneImage, at_three_sizes, images_of, matched, names_of, write_detector
from sgfx.exporting.formats import OnnxOptions, quiet, reason_of, write_onnx, write_pt2
from sgfx.exporting.varying import Inputs, other_inputs, widened, without_names
from sgfx.files.writing import replacing
from sgfx.reporting.frozen import is_frozen

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
    example_inputs: ExampleInputs,
    *,
    form: Form | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Exported:
    """Write a model as a self-contained program, in eval mode, on the CPU: ``.pt2`` (torch.export) or ``.onnx``.

    A whole detector of torchvision's kind becomes an ``.onnx`` file that takes one image ``[3, H, W]`` of any size and
    gives boxes, labels and scores. It is compared at each size of the example's images and two more, thing by thing.

    Args:
        small: a compiled model, or any other but a frozen one. It is neither run nor changed. Hooks are not exported;
            dataclasses among the outputs become dicts, and named tuples tuples.
        path: the file; its suffix chooses the format. ``torch.export.load(path).module()`` runs the one, any ONNX
            runtime the other (``pip install 'sgfx[onnx]'`` to write it).
        example_inputs: a tensor, a tuple of positional arguments (the last may be a dict of keywords), or such a dict.
        form: ``"dense"`` (zeros in place of pruned weights, the library's speed) or ``"blocks"`` (a small file, the
            paper's deployment); None means the one that is faster in ONNX Runtime.
        opset: of ONNX; None means torch.onnx's own choice.
        input_names, output_names: names for all tensors that the ONNX file takes and gives, in order.
        dynamic_shapes: which sizes may vary, as torch.export and torch.onnx take it: for each input, by position or
            name, dimensions with a ``torch.export.Dim``, ``Dim.DYNAMIC``, ``Dim.AUTO`` or a name:
            ``({0: "batch"},)``. A dimension that has one entry in `example_inputs` is exported with two. The file is
            compared with the model at smaller and larger sizes too.

    Returns:
        What was written, with the largest difference between its outputs and the model's.

    Raises:
        InputError: the model can't be exported, or the file computes something else than the model.
        FileNotFoundError: there is no such folder.
    """
    suffix = _checked_suffix(path)
    if form not in (None, "dense", "blocks"):
        raise InputError(f"form must be 'dense', 'blocks' or None, not {form!r}")
    check_model(small)
    if is_frozen(small):
        raise InputError(
            "small is a frozen model, made for this machine: export the one that it was made from. What runs the file "
            "fuses and chooses for itself"
        )
    options = OnnxOptions(opset, input_names, output_names, dynamic_shapes)
    options.check(suffix)
    given = _by_place(small, example_inputs)
    if is_detector(small) and suffix == ".onnx":
        return _export_detector(small, Path(path), images_of(given), form or DEFAULT_FORM, options)
    with preserved_random_state(), torch.no_grad():
        model = unhooked_copy(small).cpu().requires_grad_(False).eval()
        inputs = mapped(given, lambda x: x.detach().cpu().clone())
        options.check_counts(tensors_in(inputs), _outputs(model, inputs))
        twin = unhooked_copy(model)
        if plans(twin):  # what nobody reads is not worth a place in a file
            remove_unread_filters(twin, inputs)
        make_exportable(twin, form or DEFAULT_FORM)
        if dynamic_shapes is not None:
            inputs = _widened(model, inputs, dynamic_shapes)
        give_plain_outputs(twin)
        program = _program(twin, inputs, dynamic_shapes)
        every = [inputs, *_at_other_sizes(model, program, inputs, path)]
        with replacing(path) as temporary:
            run = _FORMATS[suffix](program, temporary, options)
            size = temporary.stat().st_size
            compared = [_compare(run(each), _outputs(model, each), path) for each in every]
    worst, largest = max(each[0] for each in compared), max(each[1] for each in compared)
    return Exported(Path(path), form or DEFAULT_FORM, size, worst, largest, _hooked(small))


def _export_detector(small: nn.Module, path: Path, images: list[Tensor], form: Form, options: OnnxOptions) -> Exported:
    """Write a whole detector, which takes one image of any size."""
    if options.dynamic_shapes is not None:
        raise InputError("the file of a detector takes an image of any size as it is: leave dynamic_shapes out")
    with preserved_random_state(), torch.no_grad():
        model = unhooked_copy(small).cpu().requires_grad_(False).eval()
        every = [(image.detach().cpu().clone(),) for image in at_three_sizes(images)]
        expected = [_outputs(OneImage(model), each) for each in every]
        options.check_counts([images[0]], expected[0])
        twin = unhooked_copy(model)
        if plans(twin):
            remove_unread_filters(twin, ([every[0][0]],))
        make_exportable(twin, form)
        names = names_of(model, every[0][0])
        with replacing(path) as temporary:
            run = write_detector(OneImage(twin), every[0][0], names, temporary, options)
            size = temporary.stat().st_size
            compared = [
                _compare(matched(run(each), wanted, names), wanted, path)
                for each, wanted in zip(every, expected, strict=True)
            ]
    worst, largest = max(each[0] for each in compared), max(each[1] for each in compared)
    return Exported(path, form, size, worst, largest, _hooked(small))


def _checked_suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{path} must end in .pt2 (torch.export) or .onnx, to say which format is meant")
    return suffix


def _by_place(small: nn.Module, example_inputs: ExampleInputs) -> Inputs:
    """The example inputs as positional arguments, which is all that files take."""
    given = as_inputs(example_inputs, small)
    if given is None:
        raise TypeError(
            "example_inputs must be a tensor, a tuple of positional arguments or a dict of keywords, not None"
        )
    if by_name := by_place_and_name(small, given)[1]:
        raise InputError(
            f"files take arguments by position, and {type(small).__name__}.forward takes {next(iter(by_name))!r} by "
            "name alone: wrap the model in a module that takes it by position"
        )
    return given


def _hooked(model: nn.Module) -> tuple[str, ...]:
    forward = ("_forward_hooks", "_forward_pre_hooks")
    return tuple(
        path
        for path, module in model.named_modules()
        if any(module.__dict__[key] for key in hook_dicts(module) if key in forward)
    )


def _widened(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Inputs:
    """Inputs with two entries where one would be taken for a constant, if the model takes them."""
    with suppress(Exception):  # what is wrong with dynamic_shapes, torch.export says better
        more = widened(model, inputs, dynamic_shapes)
        model(*mapped(more, Tensor.clone))
        return more
    return inputs


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors among the outputs, in order."""
    try:
        outputs = model(*mapped(inputs, Tensor.clone))
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"example_inputs of shape {shapes_of(inputs)} do not fit the model in eval mode: {error}"
        ) from error
    return tensors_in(outputs)


def _program(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> ExportedProgram:
    try:
        with quiet():
            shapes = without_names(dynamic_shapes)
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        let_memory_errors_pass(error)
        fixed = ", or change dynamic_shapes" if dynamic_shapes is not None else ""
        raise InputError(
            f"torch.export can't export {type(model).__name__}: {reason_of(error)}\n"
            f"Export a part of it, such as model.backbone{fixed}"
        ) from error
    rename_in_program(program)
    foreign = set()
    graphs = [each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    for graph in graphs:
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # places on this machine
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
                foreign.add(str(node.target))
    if foreign:
        raise InputError(f"{type(model).__name__} needs operations that torch alone does not have: {sorted(foreign)}")
    return program


_FORMATS = {".pt2": write_pt2, ".onnx": write_onnx}


def _at_other_sizes(
    model: nn.Module, program: ExportedProgram, inputs: Inputs, path: str | os.PathLike[str]
) -> list[Inputs]:
    """Smaller and larger inputs that both the model and the program take; none where nothing varies."""
    run, tried = program.module(), 0
    found: dict[str, Inputs] = {}
    for kind, other in other_inputs(program, inputs):
        tried += 1
        if kind not in found:
            with suppress(Exception):  # such as a picture that is smaller than a kernel, or not a multiple of 32
                model(*mapped(other, Tensor.clone))
                run(*mapped(other, Tensor.clone))
                found[kind] = other
    if tried and not found:
        raise InputError(
            f"{path} was not written: nothing near the sizes of example_inputs is one that both the model and what was "
            "exported take, so dynamic_shapes can't be checked. Give each Dim a min and max, or let fewer vary"
        )
    return list(found.values())


def _compare(actual: list[Tensor], expected: list[Tensor], path: str | os.PathLike[str]) -> tuple[float, float]:
    """Largest absolute difference and largest absolute output; refuse what is no mere rounding."""
    if kinds(actual) != kinds(expected):
        raise InputError(f"{path} was not written: its outputs are {kinds(actual)}, the model's {kinds(expected)}")
    if not expected:
        raise InputError(f"{path} was not written: the model's outputs hold no tensors")
    found = [difference(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)]
    for each in found:
        if not each.is_rounding:
            raise InputError(
                f"{path} was not written: an output differs from the model's by {each.worst:.1e}, where the largest is "
                f"{each.largest:.1e}. Does the model compute at random in eval mode?"
            )
    return max(each.worst for each in found), max(each.largest for each in found)
