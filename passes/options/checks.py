"""Checks of what the caller gives: the model as a whole, and every option. One clear message each, nothing changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from passes.errors import InputError
from passes.layers.known.optional_classes import class_of
from passes.options.arguments import ExampleInputs, as_inputs
from passes.options.names import covers, is_pattern, matches
from passes.options.ranges import checked_integer, checked_ratio
from passes.options.settings import NORMS, Criterion, Settings

WRAPPERS = (
    ("torch.nn.parallel", "DataParallel"),
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("lightning.fabric.wrappers", "_FabricModule"),
    ("lightning_fabric.wrappers", "_FabricModule"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
)

LeafModules: TypeAlias = str | nn.Module | type[nn.Module] | Iterable[str | nn.Module | type[nn.Module]]


def checked_settings(
    model: nn.Module,
    *,
    groups: int = 8,
    ratio: float,
    linear_ratio: float | None = None,
    ignore: str | nn.Module | Iterable[str | nn.Module] = (),
    overrides: Mapping[str, Mapping[str, float]] | None = None,
    criterion: Criterion = "l1",
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
    leaf_modules: LeafModules = (),
) -> Settings:
    """Check `model` and the options of `sgfx.compile`, and return them resolved to names of modules.

    Raises:
        InputError: a value is out of range, or a name or pattern matches nothing; says what to do.
        TypeError: a value is of the wrong type.
    """
    check_model(model)
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        raise InputError(f"{type(model).__name__} has no forward, which would show how its layers are used")
    names = _named(model, listed(ignore, "ignore"), "ignore")
    resolved = _overrides(model, overrides or {})
    for path in resolved:
        if not is_pattern(path) and (entry := next((e for e in names if covers(e, path)), None)) is not None:
            raise InputError(f"{path!r} is both overridden and ignored (by {entry!r}); leave it out of one of them")
    if not callable(criterion) and criterion not in NORMS:
        raise InputError(f"criterion must be 'l1', 'l2' or a callable from weight to importance, not {criterion!r}")
    return Settings(
        groups=checked_integer(groups, "groups", least=1, below=2**32),
        ratio=checked_ratio(ratio, "ratio"),
        linear_ratio=None if linear_ratio is None else checked_ratio(linear_ratio, "linear_ratio"),
        ignore=names,
        overrides=resolved,
        criterion=criterion,
        seed=checked_integer(seed, "seed", least=0, below=2**32),
        example_inputs=as_inputs(example_inputs, model),
        leaf_modules=resolved_leaves(model, leaf_modules),
    )


def check_model(model: nn.Module) -> None:
    """Refuse what is not a plain module with real weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if (cycle := _cycle(model)) is not None:
        raise InputError(
            f"{cycle!r} is a module that holds it itself, so that torch's own train() and state_dict() never end; "
            "keep that reference out of the registered modules, such as in a tuple"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is TorchScript; compile the Python module it was made from")
    if hasattr(model, "_original_forward"):
        raise InputError(
            "the model's forward was wrapped by accelerate; compile accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False), and prepare the result"
        )
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # else it is left alone, as a whole
            _check_module(f"module {path!r}" if path else "the model", module)


def _check_module(where: str, module: nn.Module) -> None:
    kind = type(module)
    wrappers = [class_of(home, name) for home, name in WRAPPERS]
    if any(wrapper is not None and isinstance(module, wrapper) for wrapper in wrappers):
        raise InputError(f"{where} is wrapped in {kind.__name__}; compile its .module and wrap the result")
    compiled = class_of("torch._dynamo.eval_frame", "OptimizedModule")
    if compiled is not None and isinstance(module, compiled):
        raise InputError(f"{where} is a torch.compile wrapper; compile its ._orig_mod, then torch.compile the result")
    if "quantized" in kind.__module__.split(".") and kind.__module__.startswith("torch."):
        raise InputError(f"{where} ({kind.__name__}) is quantized; compile the floating-point model, then quantize it")
    for name, tensor in module._parameters.items():
        if tensor is not None:
            _check_parameter(f"{where} ({kind.__name__})", name, tensor)


def _cycle(model: nn.Module) -> str | None:
    """Path at which a module is registered that holds this very place, or None."""
    done: set[nn.Module] = set()
    above = {model: ""}  # the holders, from the outside in
    pending = [iter(model.named_children())]
    while pending:
        name, child = next(pending[-1], ("", None))
        holder = next(reversed(above))
        if child is None:
            done.add(holder)
            del above[holder]
            pending.pop()
        elif child in above:
            return f"{above[holder]}.{name}".lstrip(".")
        elif child not in done:
            above[child] = f"{above[holder]}.{name}".lstrip(".")
            pending.append(iter(child.named_children()))
    return None


def _check_parameter(where: str, name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(f"{where} is not initialised yet: run one batch through the model before compiling")
    if tensor.is_meta:
        raise InputError(f"{where} has its {name} on the meta device: load real weights before compiling")
    if tensor.is_quantized:
        raise InputError(f"{where} has a quantized {name}; compile the floating-point model, then quantize it")


def listed(entries: Any, option: str) -> list[Any]:
    """The entries of an option that names modules: one by itself, or an iterable of them, which may be used up."""
    if isinstance(entries, str | nn.Module | type):
        return [entries]
    if not isinstance(entries, Iterable):
        raise TypeError(f"{option} takes names, patterns and modules, not {entries!r}")
    return list(entries)


def resolved_leaves(model: nn.Module, leaf_modules: LeafModules) -> tuple[str, ...]:
    """Paths of the modules that `leaf_modules` names, by itself, by pattern, by class or as they are."""
    entries = listed(leaf_modules, "leaf_modules")
    classes = tuple(entry for entry in entries if isinstance(entry, type))
    for kind in classes:
        if not any(isinstance(module, kind) for module in model.modules()):
            raise InputError(f"leaf_modules holds the class {kind.__name__}, of which the model has no module")
    names = _named(model, [entry for entry in entries if not isinstance(entry, type)], "leaf_modules")
    found: list[str] = []
    for path, module in model.named_modules():  # a module comes before what it holds: the outermost is enough
        named = isinstance(module, classes) or any(matches(name, path) for name in names)
        if path and named and not any(covers(leaf, path) for leaf in found):
            found.append(path)
    return tuple(found)


def _named(model: nn.Module, entries: list[Any], option: str) -> tuple[str, ...]:
    """Names and patterns of an option, with modules replaced by their names."""
    paths = {id(module): path for path, module in model.named_modules()}
    names = []
    for entry in entries:
        if isinstance(entry, nn.Module):
            if id(entry) not in paths:
                raise InputError(f"{option} holds a {type(entry).__name__} that is not a module of the model")
            names.append(paths[id(entry)])
            continue
        if not isinstance(entry, str):
            raise TypeError(f"{option} takes names, patterns and modules, not {entry!r}")
        if not any(matches(entry, path) for path in paths.values() if path):
            raise InputError(f"{option} entry {entry!r} matches no module of the model" + _hint(entry, paths.values()))
        names.append(entry)
    return tuple(names)


def _overrides(model: nn.Module, overrides: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict of names to dicts, not {type(overrides).__name__}")
    layers = [path for path, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]
    return {entry: _override(entry, values, layers) for entry, values in overrides.items()}


def _override(entry: str, values: object, layers: list[str]) -> dict[str, float]:
    if not isinstance(entry, str) or not isinstance(values, Mapping):
        raise TypeError(f"overrides takes {{name or pattern: {{'groups': …, 'ratio': …}}}}, not {entry!r}: {values!r}")
    unknown = values.keys() - {"groups", "ratio"}
    if unknown:
        raise InputError(f"override of {entry!r} sets {sorted(unknown)}, only 'groups' and 'ratio' can be set")
    if not any(matches(entry, path) for path in layers):
        kind = "pattern" if is_pattern(entry) else "name"
        hint = (
            f"; for all layers below it write '{entry}.*'"
            if any(covers(entry, p) for p in layers)
            else _hint(entry, layers)
        )
        raise InputError(f"override {kind} {entry!r} matches no convolution or linear layer{hint}")
    checked: dict[str, float] = {}
    if "groups" in values:
        checked["groups"] = checked_integer(values["groups"], f"groups of override {entry!r}", least=1, below=2**32)
    if "ratio" in values:
        checked["ratio"] = checked_ratio(values["ratio"], f"ratio of override {entry!r}")
    return checked


def _hint(entry: str, paths: Iterable[str]) -> str:
    near = difflib.get_close_matches(entry, [path for path in paths if path], n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    below = [path for path in paths if path.endswith(f".{entry}")]
    return f"; names are whole paths, such as {below[0]!r}, or patterns, such as '*.{entry}'" if below else ""
