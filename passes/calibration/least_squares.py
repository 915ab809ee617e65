"""Least squares with a pull towards the start: the mathematics of calibration, in float64.

For inputs ``X [rows, D]``, wanted outputs ``Y [rows, C]``, a start ``W⁰ [C, D]`` and the kept inputs K of a group,

    W_K = argmin ‖X_K W_Kᵀ − Y‖² + λ‖W_K − W⁰_K‖²,

solved for the change ``Δ = W_K − W⁰_K``: ``(X_KᵀX_K + λI) Δᵀ = X_Kᵀ(Y − X_K W⁰_Kᵀ)``. All groups of a layer share
``XᵀX`` and ``XᵀY``, of which each takes its rows and columns. Where D is large the dual is solved instead, of the
size of the rows: ``Δᵀ = X_Kᵀ (X_K X_Kᵀ + λI)⁻¹ (Y − X_K W⁰_Kᵀ)``. λ is a share of the mean diagonal
of ``XᵀX``; it also carries layers with fewer rows than inputs, and inputs that are constant.

Where an activation follows that clips at zero (ReLU), only what it passes on counts: a wanted output below zero is met
by every output below zero. `clipped_targets` gives targets to be solved for again and again with the same ``XᵀX``: the
error in what lies above zero, plus what lies above zero and should not, falls with every round (majorisation).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # λ as a share of the mean diagonal of XᵀX


def ridge(diagonal: Tensor) -> Tensor:
    """λ: a small share of the mean of `diagonal`, the diagonal of ``XᵀX``; above 0 even where all inputs are 0."""
    return RIDGE * diagonal.mean() + torch.finfo(torch.float64).tiny


def factor(gram: Tensor, keep: Tensor, ridge: Tensor) -> Tensor:
    """Cholesky factor of ``XᵀX + λI`` for the kept inputs: rows and columns `keep` of `gram`, and `ridge`."""
    regular = gram[keep[:, None], keep]
    regular.diagonal().add_(ridge)
    lower: Tensor = torch.linalg.cholesky(regular)
    return lower


def solve(factor: Tensor, cross: Tensor) -> Tensor:
    """The change ``Δ [C, D]`` of one group's weights.

    Args:
        factor: Cholesky factor of ``X_KᵀX_K + λI``, ``[D, D]``.
        cross: ``X_Kᵀ(Y − X_K W⁰_Kᵀ)``, ``[D, C]``.
    """
    return torch.cholesky_solve(cross, factor).T


def solve_dual(x: Tensor, left: Tensor, ridge: Tensor) -> Tensor:
    """The same by the dual, from ``X_K [rows, D]`` and `left`, ``Y − X_K W⁰_Kᵀ [rows, C]``, themselves."""
    every = torch.arange(len(x), device=x.device)
    return (x.T @ torch.cholesky_solve(left, factor(x @ x.T, every, ridge))).T


def clipped_targets(wanted: Tensor, present: Tensor) -> Tensor:
    """What to aim at where only ``max(·, 0)`` of an output is read: `present` wherever both are below zero.

    >>> clipped_targets(torch.tensor([2.0, -1.0, -1.0]), torch.tensor([-3.0, -4.0, 5.0]))
    tensor([ 2., -4.,  0.])
    """
    return torch.where(wanted > 0, wanted, present.clamp(max=0))
