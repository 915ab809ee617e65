"""Observation: what can't be traced is run, on copies, to see which layers alone use their own parameters.

The example inputs go through a copy in eval and through another in train mode. Hooks keep the stack of running modules;
a torch function mode sees every operation that is given a parameter: if the module on top of the stack does not own it,
the use is foreign, and the layer must stay as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.errors import InputError, let_memory_errors_pass
from passes.infra.random_state import own_random_state
from passes.models.copying import copy_inputs
from passes.models.values import mapped
from passes.options.arguments import call_model
from passes.options.names import holders_of
from passes.tracing.parameter_use import ParameterWatch
from passes.tracing.shapes import without_storage
from passes.tracing.trace import Tracing


@dataclass(frozen=True)
class Observation:
    """What runs of the example inputs through copies of the model showed.

    Attributes:
        called: paths of the modules that were called, in order of execution, with the arguments of their first call
            in each mode (tensors without storage).
        foreign: paths of layers whose parameters were used outside their own call, with the operation.
        strays: pairs of a module and one that holds it, where the first was called outside a call of the second.
        failures: modes in which the inputs could not be run, with the reason.
    """

    called: dict[str, dict[str, tuple[tuple[object, ...], dict[str, object]]]]
    foreign: dict[str, str]
    strays: set[tuple[str, str]]
    failures: dict[str, str]


def observe(tracing: Tracing, example_inputs: tuple[object, ...]) -> Observation:
    """Run `example_inputs` through a copy for each mode, and note how modules and parameters are used.

    Raises:
        InputError: they can't be run in eval mode, and it is not for want of the model's hooks.
    """
    seen = Observation({}, {}, set(), {})
    for mode in tracing.shadows:
        copy = tracing.copy_in(mode)
        try:
            with own_random_state(), torch.no_grad():
                _Watch(copy, mode, seen).run(example_inputs)
        except Exception as error:
            let_memory_errors_pass(error)
            if mode == "eval" and not tracing.hooked:
                raise InputError(f"example_inputs do not fit {type(copy).__name__}: {error}") from error
            seen.failures[mode] = f"running the example inputs in {mode} mode failed: {str(error).splitlines()[0]}"
    return seen


class _Watch(ParameterWatch):
    """Keeps the stack of running modules, and notes each use of a parameter by another than its owner's call."""

    def __init__(self, model: nn.Module, mode: str, seen: Observation) -> None:
        super().__init__(model)
        self._model, self._mode, self._seen = model, mode, seen
        self._running: list[str] = []

    def note(self, paths: list[str], operation: str) -> None:
        """Only the call of the layer itself may use its parameters."""
        top = self._running[-1] if self._running else ""
        for owner in (path.rpartition(".")[0] for path in paths):
            if owner != top:
                self._seen.foreign.setdefault(owner, operation)

    def run(self, inputs: tuple[object, ...]) -> None:
        handles = []
        for path, module in self._model.named_modules():
            entering, leaving = self._entering(path), self._leaving
            handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving, always_call=True))
        try:
            with self:
                call_model(self._model, copy_inputs(inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Any:
        holders = ["", *holders_of(path)] if path else []

        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._seen.strays.update((path, holder) for holder in holders if holder not in self._running)
            self._running.append(path)
            with torch._C.DisableTorchFunction():
                self._seen.called.setdefault(path, {}).setdefault(self._mode, mapped((args, kwargs), without_storage))

        return hook

    def _leaving(self, module: nn.Module, args: object, output: object) -> None:
        self._running.pop()
