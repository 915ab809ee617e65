"""`sgfx.verify`: how far a regrouped model is from the masked one it stands for, in numbers that users can check.

The reference is the dense model's structure, filled with the parameters and buffers that the small model has now
(`models.reference`), so that the comparison serves after fine-tuning too. Both run as copies without hooks of the
user's, first in eval mode and then in train mode. The random numbers of each run start anew: the two draw the
same ones in the same order, so dropout and stochastic depth stay on and drop the same values. Only where channels
were eliminated would dropout draw for fewer of them: there, dropout is off in both.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from passes.errors import InputError, let_memory_errors_pass
from passes.infra.random_state import own_random_state
from passes.layers.channel_cut import channel_dim, cut_of, cuts
from passes.layers.masked import Masked
from passes.layers.plan import LayerPlan
from passes.models.comparing import distance
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.reference import as_rows, masked_reference, rows_by_name
from passes.models.values import Plain, comparable, mapped, tensors_in
from passes.options.arguments import ExampleInputs, as_inputs, call
from sgfx.reporting.reporting import plans_of_pair

DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_, torch.feature_dropout,
    torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip


@dataclass(frozen=True)
class LayerError:
    """One layer: how far its output is from the masked layer's, and its weights from the dense model's.

    Attributes:
        path: module path.
        kind: the dense layer's class.
        eval_error, train_error: largest difference of its outputs in that mode, relative to the largest output of the
            masked layer; None where neither model calls it. What the layers before it do wrong counts too.
        moved: ‖now − then‖ / ‖then‖ over the weights that are kept.
    """

    path: str
    kind: str
    eval_error: float | None
    train_error: float | None
    moved: float


@dataclass(frozen=True)
class Verification:
    """What `sgfx.verify` returns: print it, or take plain data from `to_dict`.

    An error is the largest absolute difference over the largest absolute value of the reference: about 1e-7 is rounding
    in fp32, 1e-15 in fp64. It is infinite where the two have different shapes, or not the same NaNs, or differ in what
    is no number. Outputs are taken apart down to their tensors, in tuples, lists, dicts and dataclasses.

    Attributes:
        eval_error, train_error: of the model's outputs, in that mode.
        gradient_error: of the gradients in train mode, relative to the largest of all gradients; None where the
            outputs have no gradients.
        moved: ‖now − then‖ / ‖then‖ over all kept parameters: how far training has taken them from `dense`.
        layers: one entry for each layer with a plan, in the order of ``named_modules()``.
    """

    eval_error: float
    train_error: float
    gradient_error: float | None
    moved: float
    layers: tuple[LayerError, ...]

    @property
    def max_error(self) -> float:
        """The largest error of the outputs of the model and of any layer, in eval and in train mode."""
        errors = [error for layer in self.layers for error in (layer.eval_error, layer.train_error)]
        return max(self.eval_error, self.train_error, *(error for error in errors if error is not None))

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain data: dicts, lists, numbers and strings."""
        return {"max_error": self.max_error, **asdict(self)}

    def __str__(self) -> str:
        """The numbers, and a table of the layers that differ."""
        from tabulate import tabulate

        gradients = "none" if self.gradient_error is None else f"{self.gradient_error:.1e}"
        text = (
            f"largest error {self.max_error:.1e}: outputs {self.eval_error:.1e} in eval mode, {self.train_error:.1e} "
            f"in train mode; gradients {gradients}; weights moved by {100 * self.moved:.2f}% since they were dense"
        )
        different = [layer for layer in self.layers if layer.eval_error or layer.train_error]
        if not different:
            return f"{text}\nall {len(self.layers)} layers agree exactly"
        rows = [
            [layer.path, layer.kind, _number(layer.eval_error), _number(layer.train_error), f"{100 * layer.moved:.2f}%"]
            for layer in different
        ]
        table = tabulate(rows, ["layer", "kind", "eval", "train", "moved"], disable_numparse=True)
        return f"{text}\n{len(different)} of {len(self.layers)} layers differ:\n{table}"


def verify(dense: nn.Module, small: nn.Module, example_inputs: ExampleInputs) -> Verification:
    """Compare a regrouped model with the masked one it stands for: outputs, layers, gradients, in eval and train mode.

    Args:
        dense: the model before `sgfx.compile`. Neither model is run or changed.
        small: what `sgfx.compile` or `Pruner.lower` returned, fine-tuned or not.
        example_inputs: a tensor, a tuple of positional arguments (the last may be a dict of keywords), or such a dict,
            which fit both modes: at least two images where the model has batch norms, and the targets where a detector
            needs them to train.

    Raises:
        InputError: `small` was not compiled, is no compiled form of `dense`, the inputs do not fit, or the outputs hold
            something that can't be compared, or no number at all.
    """
    found = plans_of_pair(dense, small)
    masked = next((path for path, module in small.named_modules() if isinstance(module, Masked)), None)
    if masked is not None:
        raise InputError(f"layer {masked!r} of small is masked, not regrouped: verify what Pruner.lower returns")
    with torch.inference_mode(False), torch.enable_grad():  # gradients are compared, whatever the caller records
        return _verified(dense, small, found, as_inputs(example_inputs, dense) or ())


def _verified(
    dense: nn.Module, small: nn.Module, found: dict[str, LayerPlan], inputs: tuple[object, ...]
) -> Verification:
    reference, twin = masked_reference(dense, small), unhooked_copy(small)
    rows = rows_by_name(dense, small)
    moved, weights_moved = _moved(dense, small, rows, found)
    eval_error, eval_layers, _ = _compare(reference, twin, rows, found, inputs, training=False)
    train_error, train_layers, gradient_error = _compare(reference, twin, rows, found, inputs, training=True)
    layers = tuple(
        LayerError(path, plan.kind, eval_layers[path], train_layers[path], weights_moved[path])
        for path, plan in found.items()
    )
    return Verification(eval_error, train_error, gradient_error, moved, layers)


def _moved(
    dense: nn.Module, small: nn.Module, rows: dict[str, Tensor], found: dict[str, LayerPlan]
) -> tuple[float, dict[str, float]]:
    """How far the kept parameters are from the dense model's: all of them, and the weight of each layer."""
    now = dict(small.named_parameters())
    distances = {}
    for name, tensor in dense.named_parameters():
        then = as_rows(tensor.detach())[rows[name]].double()
        distances[name] = float((now[name].detach().double().reshape(then.shape) - then).norm()), float(then.norm())
    each = {path: _share([distances.get(f"{path}.weight".lstrip("."), (0.0, 0.0))]) for path in found}
    return _share(distances.values()), each


def _share(distances: Iterable[tuple[float, float]]) -> float:
    """Distances over norms, both summed in squares."""
    pairs = list(distances)
    distance, norm = (float(np.linalg.norm([pair[side] for pair in pairs])) for side in (0, 1))
    return distance / norm if norm else distance


@dataclass(frozen=True)
class _Trial:
    """What one run of a model yields: outputs by place, each layer's call by call, and gradients by parameter."""

    outputs: dict[str, Tensor | Plain]
    layers: dict[str, list[Tensor]]
    gradients: dict[str, Tensor]


def _compare(
    reference: nn.Module,
    twin: nn.Module,
    rows: dict[str, Tensor],
    found: dict[str, LayerPlan],
    inputs: tuple[object, ...],
    *,
    training: bool,
) -> tuple[float, dict[str, float | None], float | None]:
    """Errors of the outputs, of each layer's outputs, and of the gradients."""
    fewer = bool(cuts(twin))
    expected, actual = (_run(model, list(found), inputs, training, fewer) for model in (reference, twin))
    layers = {path: _layer_error(twin, path, actual.layers[path], expected.layers[path]) for path in found}
    return _output_error(actual.outputs, expected.outputs), layers, _gradient_error(actual, expected, rows)


def _layer_error(twin: nn.Module, path: str, actual: list[Tensor], expected: list[Tensor]) -> float | None:
    """Error of one layer's outputs, over the channels that remain; None if neither model calls it."""
    layer = twin.get_submodule(path)
    remain = cut_of(layer).outputs
    if remain is not None:
        expected = [x.index_select(channel_dim(layer, x.dim()), remain.to(x.device)) for x in expected]
    return _error(actual, expected) if actual or expected else None


def _run(model: nn.Module, paths: list[str], inputs: tuple[object, ...], training: bool, fewer: bool) -> _Trial:
    layers: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Any:  # clones, since what comes next may work in place
        return lambda _, args, output: layers[path].extend(x.detach().clone() for x in tensors_in(output))

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    model.train(training)
    try:
        with own_random_state(), torch.set_grad_enabled(training), _WithoutDropout() if fewer else nullcontext():
            random.seed(0)
            np.random.seed(0)
            given = call(model, copy_inputs(inputs))
    except Exception as error:
        let_memory_errors_pass(error)
        shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
        if training:
            raise InputError(
                f"example_inputs ({shapes}) fit the model in eval mode, but not in train mode: {error}. Give inputs "
                "that fit both: a batch of at least two where there are batch norms, and what training needs besides, "
                "such as the targets of a detector"
            ) from error
        raise InputError(f"example_inputs ({shapes}) do not fit the model in eval mode: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    outputs = comparable(given, "output")
    tensors = [x for x in outputs.values() if isinstance(x, Tensor)]
    if not tensors:
        mode = "train" if training else "eval"
        raise InputError(f"there is nothing to compare: the outputs in {mode} mode hold no tensors and no numbers")
    gradients = _gradients(model, tensors)
    return _Trial(mapped(outputs, Tensor.detach), layers, gradients)


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


def _gradient_error(actual: _Trial, expected: _Trial, rows: dict[str, Tensor]) -> float | None:
    if not expected.gradients and not actual.gradients:
        return None
    if expected.gradients.keys() != actual.gradients.keys():
        return float("inf")
    theirs = [as_rows(gradient)[rows[name]].flatten() for name, gradient in expected.gradients.items()]
    mine = [actual.gradients[name].flatten() for name in expected.gradients]
    return _error([torch.cat([x.double() for x in mine])], [torch.cat([x.double() for x in theirs])])


def _output_error(actual: dict[str, Tensor | Plain], expected: dict[str, Tensor | Plain]) -> float:
    """The error of all tensors; infinite where two outputs have other places, or differ in what is no tensor."""
    if actual.keys() != expected.keys():
        return float("inf")
    pairs = [(actual[place], wanted) for place, wanted in expected.items()]
    tensors = [(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor)]
    if any(x != y for x, y in pairs if not isinstance(x, Tensor) and not isinstance(y, Tensor)):
        return float("inf")
    alone = any(isinstance(x, Tensor) != isinstance(y, Tensor) for x, y in pairs)
    return float("inf") if alone else _error([x for x, _ in tensors], [y for _, y in tensors])


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of tensors, pair by pair; infinite where they can't be compared."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return float("inf")
    return max(map(_distance, actual, expected), default=0.0)


def _distance(actual: Tensor, expected: Tensor) -> float:
    worst, most = distance(actual, expected)
    return worst / most if most else worst


def _number(error: float | None) -> str:
    return "not called" if error is None else f"{error:.1e}"
