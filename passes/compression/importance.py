"""Importance: how much each input matters to each filter (the paper's eq. 5, 6).

For a convolution ``v[f, c] = ‖W[f, c, :, :]‖`` in the norm that the criterion names; a linear layer is the case of one
weight per connection. The norm is taken where the weight lies (in float32 at least); only the vectors travel to the
CPU. Other criteria plug in as callables from the weight ``[C_out, C_in, *kernel]`` to an importance ``[C_out, C_in]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.compression.selection import TARGETS
from passes.errors import InputError, let_memory_errors_pass
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.masked import effective_weight
from passes.options.settings import NORMS, SETTINGS, Criterion

IMPORTANCE = Fact[dict[str, Tensor]]("importance")  # [C_out, C_in] of each target, by module path


def importance(weight: Tensor, criterion: Criterion = "l1") -> Tensor:
    """Importance vectors of all filters of a layer (eq. 5, 6).

    Args:
        weight: ``[C_out, C_in, *kernel]`` on any device.
        criterion: ``"l1"``, ``"l2"``, or a callable from the weight to an importance ``[C_out, C_in]``.

    Returns:
        ``[C_out, C_in]`` on the CPU, float32 or float64, finite and not negative.

    Raises:
        InputError: the weight holds NaN or infinite values, or the criterion gave another shape, NaN, infinite or
            negative values.

    >>> importance(torch.tensor([[[1.0, -2.0], [0.0, 3.0]]]))
    tensor([[3., 3.]])
    """
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise InputError("its weight holds NaN or infinite values; repair or retrain the layer, or ignore it")
    if callable(criterion):
        try:
            vectors = criterion(weight.clone())  # it may compute in place
        except Exception as error:
            let_memory_errors_pass(error)
            raise InputError(f"the criterion failed on a weight {list(weight.shape)}: {error}") from error
        return _checked(vectors, weight)
    precise = weight if weight.dtype == torch.float64 else weight.float()
    norm = _norm(precise, NORMS[criterion])
    if not torch.isfinite(norm).all():  # the sum is beyond single precision
        norm = _norm(weight.double(), NORMS[criterion])
    return norm.cpu()


def _norm(weight: Tensor, order: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight.reshape(*weight.shape[:2], -1), order, dim=2)
    return norm


def _checked(vectors: object, weight: Tensor) -> Tensor:
    expected = list(weight.shape[:2])
    if not isinstance(vectors, Tensor):
        raise InputError(f"the criterion returned {type(vectors).__name__}, expected a tensor {expected}")
    if list(vectors.shape) != expected:
        raise InputError(f"the criterion returned shape {list(vectors.shape)}, expected [C_out, C_in] = {expected}")
    vectors = vectors.detach().cpu()
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    if not torch.isfinite(vectors).all() or (vectors < 0).any():
        raise InputError(
            "the criterion returned NaN, infinite or negative values, expected finite values of at least 0"
        )
    return vectors


class Importance(Pass):
    """Find the importance vectors of every target layer, from the weights that its mask leaves."""

    name = "importance"
    requires = (SETTINGS, TARGETS)
    ensures = (IMPORTANCE,)

    def run(self, compilation: Compilation) -> Facts:
        """Compute the vectors of all target layers."""
        vectors = {}
        for path in compilation[TARGETS]:
            layer = compilation.model.get_submodule(path)
            try:
                vectors[path] = importance(effective_weight(layer), compilation[SETTINGS].criterion)
            except InputError as error:
                raise InputError(f"layer {path!r} ({type(layer).__name__}): {error}") from error
        return {IMPORTANCE: vectors}
