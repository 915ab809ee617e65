"""`sgfx.save` and `sgfx.load`: compiled models in safetensors files (`sgfx.files.container`), and back into dense ones.

A file holds tensors and plain data, never code. Plain checkpoints, which `load` opens too, are read by
`sgfx.files.checkpoints`.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.compression import lower
from passes.errors import InputError
from passes.freezing import Decisions, attach_decisions, decisions_of
from passes.layers import Grouped, Masked, apply_cuts, plan_of, plans
from passes.models import (
    Record,
    adopt,
    agree,
    copy_model,
    cut_from_record,
    describe,
    named_tensors,
    plan_from_record,
    transient,
)
from passes.options import check_model
from sgfx.files.checkpoints import from_state_dict, is_torch_file, read_torch_file
from sgfx.files.container import ANEW, brief, check_size, packed, unpacked
from sgfx.files.reading import content_of
from sgfx.files.writing import replacing
from sgfx.reporting.frozen import is_frozen

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# What comes of plain data that `save` never writes.
_SENSELESS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def save(small: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compiled model to a safetensors file: weights, buffers, the plan of each layer, and `freeze`'s decisions.

    The file appears under its name only once it is whole and on the disk, in place of an earlier one. Hooks, modes,
    ``requires_grad`` and attributes that the model's class sets by itself are not part of it.

    Args:
        small: what `sgfx.compile` or `Pruner.lower` returned, or a model that holds such a part. It is not changed.
        path: the file; its folder exists.

    Raises:
        InputError: `small` is not compiled, or holds what tensors and plain data can't say; names the module.
        FileNotFoundError: there is no such folder.
    """
    _check_savable(small)
    if Path(path).suffix.lower() in (".onnx", ".pt2"):
        raise InputError(f"{path} would be no {Path(path).suffix[1:]} file but a safetensors one: use sgfx.export")
    tensors = {name: _storable(name, tensor) for name, tensor in named_tensors(small).items()}
    structure = describe(small)
    if (decisions := decisions_of(small)) is not None:
        structure["decisions"] = decisions.to_dict()
    metadata = packed(structure, tensors)
    with replacing(path) as temporary:
        from safetensors.torch import save_file

        save_file(tensors, temporary, metadata)


def load(path: str | os.PathLike[str], *, into: M) -> M:
    """Put what `save` wrote into a fresh dense model, in place, and return it.

    The model gets the structure, the plans, the weights and the buffers of the saved one, exactly; it keeps its own
    modes, hooks, devices and ``requires_grad``, and is fit for further training (make the optimizer afterwards: the
    regrouped layers have new weights). Nothing of it changes before the whole file has been checked against it. The
    file is read once, into memory of its own (twice its size at most): what becomes of it later changes nothing.

    Another model is one of other classes, shapes or hyperparameters: public attributes of torch's and torchvision's own
    modules (a slope, the groups of a norm, a dropout), and those attributes of other classes that their forwards read,
    but for the last digits of numbers. What may differ are attributes that no forward reads (an epoch, a path), those
    that a forward sets itself, and those that only one of the two has. Files of format 1 know only the geometry of
    layers.

    Plain checkpoints of compiled models are opened too: files of ``torch.save`` and safetensors with a state dict, by
    itself or under ``state_dict``, ``model``, ``model_ema``, …, names with ``module.`` before them or without. Nothing
    is unpickled. State dicts carry the structure, but neither hyperparameters nor checksum and decisions. Eliminated
    channels are eliminated anew; where others go than did (it took example inputs), `save` is needed. Whatever the
    file, `into` has the head that was saved: for another one load first, and replace the head then.

    Args:
        path: the file.
        into: a dense model of the class and options that the saved one had before it was compiled.

    Raises:
        InputError: the file is damaged, altered, not of a compiled model or of a newer sgfx, or `into` is another
            model; says where, and what to do.
        FileNotFoundError: there is no such file.
    """
    _check_fresh(into)
    file = Path(path)
    with torch.inference_mode(False):  # or what is made here could never be trained
        content = content_of(file)
        _check_no_program(file, content)
        if is_torch_file(content):
            structure, tensors = None, read_torch_file(file, content)
        else:
            check_size(file, content, into)
            structure, tensors = unpacked(file, content)
        if structure is None:
            small, decisions = from_state_dict(into, tensors, file), None
        else:
            small, decisions = _rebuilt_whole(file, into, structure, tensors)
    adopt(into, small)
    attach_decisions(into, decisions)
    return into


def _rebuilt_whole(file: Path, into: M, structure: Record, tensors: dict[str, Tensor]) -> tuple[M, Decisions | None]:
    """A copy of `into` with all that a file of `save` holds, and `freeze`'s decisions, after every check."""
    try:
        small = _rebuilt(into, structure, tensors)
        return small, Decisions.from_dict(structure["decisions"]) if "decisions" in structure else None
    except InputError as error:
        raise InputError(f"{file} does not fit {type(into).__name__}: {error}. {ANEW}") from error
    except _SENSELESS as error:  # though the sum is right
        kind = type(error).__name__
        raise InputError(f"{file} is malformed ({kind}: {error}); it was not written by sgfx") from error


def _check_savable(small: nn.Module) -> None:
    check_model(small)
    if is_frozen(small):
        raise InputError("small is a frozen model: save the one that it was made from; the decisions are kept with it")
    found = plans(small)
    if not found:
        raise InputError("the model has no layer plans: save what sgfx.compile or Pruner.lower returned")
    for path, module in small.named_modules():
        where = f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
        if isinstance(module, Masked):
            raise InputError(
                f"layer {path!r} is masked, between two pruning steps: save what Pruner.lower returns, or keep "
                "pruner.state_dict() to go on later"
            )
        plan = plan_of(module)
        if isinstance(module, Grouped) != (plan is not None and plan.grouped):
            raise InputError(f"{where} does not agree with its layer plan: it was replaced after compiling")
        if not isinstance(module, Grouped) and type(module).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(f"{where} keeps extra state (get_extra_state), which a file of tensors can't hold")


def _check_fresh(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"into must be a torch.nn.Module, not {type(model).__name__}")
    tensors = named_tensors(model)
    meta = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise InputError(f"into has {meta!r} on the meta device: create the model with real weights, or use to_empty")
    check_model(model)
    if plans(model) or any(isinstance(module, Grouped | Masked) for module in model.modules()):
        raise InputError("into was compiled before. Make a fresh dense model of its class")
    for name, tensor in tensors.items():
        overlapping = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        if overlapping or (tensor.is_inference() and not torch.is_inference_mode_enabled()):
            kind = "expanded" if overlapping else "made in inference mode"
            raise InputError(f"into has {name!r} {kind}, so it can't be written to. Make it an ordinary tensor")


def _check_no_program(file: Path, content: bytes) -> None:
    """Refuse what `sgfx.export` writes: it holds operations, not a model's modules."""
    runs = {
        ".pt2": "torch.export.load(path).module() runs it",
        ".onnx": "a runtime such as ONNX Runtime runs it",
    }
    suffix = file.suffix.lower()
    if content.startswith(b"PK\x03\x04"):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as archive:
            program = any(name.endswith("archive_format") for name in archive.namelist())
            suffix = ".pt2" if program else suffix
    if suffix in runs:
        raise InputError(
            f"{file} is a program in the format {suffix}, as sgfx.export writes it, not a model: {runs[suffix]}. To "
            "load a model and train it further, write it with sgfx.save"
        )


def _storable(name: str, tensor: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):
        way = "save the model before it is made one"
        if hasattr(tensor, "full_tensor"):  # a DTensor
            way = (
                "gather the parts of the distributed model (get_model_state_dict with full_state_dict=True, of "
                "torch.distributed.checkpoint.state_dict), load them into a compiled one that is not distributed, and "
                "save that, in one process"
            )
        raise InputError(f"{name!r} is a {type(tensor).__name__}, which a file of plain tensors can't hold: {way}")
    if tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{name!r} is {'on the meta device' if tensor.is_meta else 'quantized'}; a file holds values")
    if tensor.layout != torch.strided:
        raise InputError(f"{name!r} is {tensor.layout}; a file holds dense tensors alone")
    # Always a copy of its own: names of one file must not share memory, and the sum must hold for what is written.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _rebuilt(model: M, structure: Record, tensors: dict[str, Tensor]) -> M:
    """A copy of `model` with the structure and values of the file, after every check."""
    _check_modules(describe(model), structure)
    made = {path: _made(plan_from_record, path, record, model) for path, record in structure["plans"].items()}
    small = copy_model(model, shared=named_tensors(model).values())
    lower(small, made)
    apply_cuts(small, {path: _made(cut_from_record, path, record, small) for path, record in structure["cuts"].items()})
    _fill(small, tensors, set(structure["transient"]))
    return small


def _made(make: Callable[[Record, nn.Module], T], path: str, record: Record, model: nn.Module) -> T:
    """The plan or cut of the module at `path`, from its record."""
    try:
        return make(record, model.get_submodule(path))
    except InputError as error:
        raise InputError(f"layer {path!r}: {error}") from error


def _check_modules(own: Record, given: Record) -> None:
    if given["model"] != own["model"]:
        raise InputError(f"it holds a {brief(given['model'])}")
    modules, theirs = own["modules"], given["modules"]
    if missing := [path for path in theirs if path not in modules]:
        raise InputError(f"the model lacks {_few(missing)}")
    if extra := [path for path in modules if path not in theirs]:
        raise InputError(f"the file lacks {_few(extra)}")
    for path, record in theirs.items():
        mine = modules[path]
        # What one of the two lacks was put there later, or not written by the sgfx that wrote the file.
        for key in ("class", *mine):
            if key in record and not agree(record[key], mine[key]):
                where = f"module {path!r}" if path else "the model"
                raise InputError(
                    f"{where} has {key} {brief(record[key])} in the file and {brief(mine[key])} in the model"
                )
    if given["ties"] != own["ties"]:
        names = sorted({*given["ties"].items()} ^ {*own["ties"].items()})
        raise InputError(f"{' and '.join(map(repr, names[0]))} are one tensor in the file or in the model, not in both")


def _fill(small: nn.Module, tensors: dict[str, Tensor], optional: set[str]) -> None:
    """Give `small` the values of the file; buffers that are not persistent only where both have them alike."""
    own = named_tensors(small)
    optional = optional | transient(small)
    if missing := [name for name in tensors if name not in own and name not in optional]:
        raise InputError(f"the model lacks {_few(missing)}")
    if extra := [name for name in own if name not in tensors and name not in optional]:
        raise InputError(f"the file lacks {_few(extra)}")
    values: dict[int, Tensor] = {}
    for name, mine in own.items():
        value = tensors.get(name)
        if value is not None and (value.dtype, value.shape) == (mine.dtype, mine.shape):
            value = value.to(mine.device)
            is_parameter = isinstance(mine, nn.Parameter)
            values[id(mine)] = nn.Parameter(value, requires_grad=mine.requires_grad) if is_parameter else value
        elif value is not None and name not in optional:
            raise InputError(f"{name!r} is {_kind(value)} in the file and {_kind(mine)} in the model")
    for module in small.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its registries can't be written to
            with torch.no_grad():
                for each in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                    each.copy_(values.get(id(each), each))
            continue
        registries: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for registry in registries:
            registry.update({key: values[id(mine)] for key, mine in registry.items() if id(mine) in values})


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _few(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
