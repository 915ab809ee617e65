"""`sgfx.verify`: how far a regrouped model is from the masked one it stands for, in numbers that users can check.

The reference is the dense model's structure, filled with the parameters and buffers that the small model has now
(`models.reference`), so that the comparison serves after fine-tuning too. Both run as copies without hooks of the
user's, first in eval mode and then in train mode. The random numbers of each run start anew: the two draw the
same ones in the same order, so dropout and stochastic depth stay on and drop the same values. Only where channels
were eliminated would dropout draw for fewer of them: there, dropout is off in both.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.layers import LayerPlan, Masked, channel_dim, cut_of, cuts
from passes.models import Plain, as_rows, difference, masked_reference, rows_by_name, unhooked_copy
from passes.options import ExampleInputs, as_inputs
from sgfx.reporting.reporting import plans_of_pair
from sgfx.verifying.results import LayerError, Verification
from sgfx.verifying.trial import Trial, run_trial


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
    expected, actual = (run_trial(model, list(found), inputs, training, fewer) for model in (reference, twin))
    layers = {path: _layer_error(twin, path, actual.layers[path], expected.layers[path]) for path in found}
    return _output_error(actual.outputs, expected.outputs), layers, _gradient_error(actual, expected, rows)


def _layer_error(twin: nn.Module, path: str, actual: list[Tensor], expected: list[Tensor]) -> float | None:
    """Error of one layer's outputs, over the channels that remain; None if neither model calls it."""
    layer = twin.get_submodule(path)
    remain = cut_of(layer).outputs
    if remain is not None:
        expected = [x.index_select(channel_dim(layer, x.dim()), remain.to(x.device)) for x in expected]
    return _error(actual, expected) if actual or expected else None


def _gradient_error(actual: Trial, expected: Trial, rows: dict[str, Tensor]) -> float | None:
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
    return max((difference(*pair).relative for pair in zip(actual, expected, strict=True)), default=0.0)
