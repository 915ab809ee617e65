"""One run of a model for a comparison: its outputs, what its layers give, and gradients.

The random numbers of each run start anew: two models that draw alike draw the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from passes.errors import InputError, let_memory_errors_pass
from passes.infra import own_random_state
from passes.models import Plain, comparable, copy_inputs, mapped, shapes_of, tensors_in
from passes.options import call_model

DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_, torch.feature_dropout,
    torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What one run of a model yields: outputs by place, each layer's call by call, and gradients by parameter."""

    outputs: dict[str, Tensor | Plain]
    layers: dict[str, list[Tensor]]
    gradients: dict[str, Tensor]


def run_trial(model: nn.Module, paths: list[str], inputs: tuple[object, ...], training: bool, fewer: bool) -> Trial:
    """Run a model, and note what it gives; its hooks and modes are worked on.

    Args:
        model: a copy without hooks.
        paths: of the layers whose outputs are noted.
        inputs: its arguments; copies of them are given.
        training: the mode; gradients are computed in train mode alone.
        fewer: leave out dropout, which would draw for other numbers of channels.

    Raises:
        InputError: the inputs do not fit, or the outputs can't be compared.
    """
    layers: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        layers[path] += [x.detach().clone() for x in tensors_in(output)]  # what comes next may work in place

    handles = [model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]
    model.train(training)
    try:
        with own_random_state(), torch.set_grad_enabled(training), _WithoutDropout() if fewer else nullcontext():
            random.seed(0)
            np.random.seed(0)
            given = call_model(model, copy_inputs(inputs))
    except Exception as error:
        let_memory_errors_pass(error)
        shapes = shapes_of(inputs)
        if training:
            raise InputError(
                f"example_inputs of shape {shapes} fit the model in eval mode, but not in train mode: {error}. Give "
                "inputs that fit both: a batch of at least two where there are batch norms, and what training needs "
                "besides, such as the targets of a detector"
            ) from error
        raise InputError(f"example_inputs of shape {shapes} do not fit the model in eval mode: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    outputs = comparable(given, "output")
    tensors = [x for x in outputs.values() if isinstance(x, Tensor)]
    if not tensors:
        mode = "train" if training else "eval"
        raise InputError(f"there is nothing to compare: the outputs in {mode} mode hold no tensors and no numbers")
    gradients = _gradients(model, tensors)
    return Trial(mapped(outputs, Tensor.detach), layers, gradients)


class _WithoutDropout(TorchFunctionMode):
    """Leaves out dropout, of modules and of functions."""

    def __torch_function__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def _gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of all outputs, with respect to the parameters that it depends on."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.requires_grad]
    loss = sum((x.flatten() * torch.arange(x.numel(), device=x.device).cos()).sum() for x in parts)
    if not isinstance(loss, Tensor):
        return {}
    try:
        with own_random_state():
            loss.backward()  # type: ignore[no-untyped-call]  # checkpoints that are reentrant allow nothing else
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"{type(model).__name__} can't be trained, so its gradients can't be compared: {error}. Mend its forward, "
            "or verify it with requires_grad_(False)"
        ) from error
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
