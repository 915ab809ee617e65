"""The mathematics of calibration against least squares of torch's own on an augmented system."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passes.calibration.least_squares import clipped_targets, factor, ridge, solve, solve_dual
from passes.calibration.rows import input_rows, output_positions, output_rows


def augmented(x: Tensor, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    """The minimum of ‖XWᵀ − Y‖² + λ‖W − W⁰‖² as plain least squares with λ's rows below X."""
    root = penalty**0.5
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([y, root * start.T])).solution.T


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_primal_and_dual_are_the_augmented_least_squares(rows, inputs, filters, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y, start = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, inputs), (rows, filters), (filters, inputs))
    )
    penalty = torch.tensor(0.3, dtype=torch.float64)
    expected = augmented(x, y, start, 0.3)
    left = y - x @ start.T
    primal = start + solve(factor(x.T @ x, torch.arange(inputs), penalty), x.T @ left)
    torch.testing.assert_close(primal, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(start + solve_dual(x, left, penalty), expected, rtol=1e-9, atol=1e-9)


def test_inputs_of_zero_are_no_singular_matrix():
    gram = torch.zeros(3, 3, dtype=torch.float64)
    lower = factor(gram, torch.arange(3), ridge(gram.diagonal()))
    assert torch.equal(solve(lower, torch.zeros(3, 2, dtype=torch.float64)), torch.zeros(2, 3, dtype=torch.float64))
    assert not gram.any()  # the factor is made of a copy


def test_clipped_targets_let_the_error_behind_a_relu_fall():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    wanted = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    weight = torch.linalg.lstsq(x, wanted).solution
    errors = []
    for _ in range(10):
        present = x @ weight
        positive = torch.where(wanted > 0, present - wanted, present.clamp(min=0))
        errors.append(float(positive.square().sum()))
        weight = torch.linalg.lstsq(x, clipped_targets(wanted, present)).solution
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (9,)),
        (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (7, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (6, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 6)),
        (nn.Conv3d(3, 4, 2, padding=1), (4, 3, 3)),
        (nn.Linear(3, 4), ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unfolded_rows_times_the_weight_are_the_layer(layer, size):
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    y = layer(x).detach()
    count = output_positions(layer, y)
    assert count == 2 * y[0, 0].numel()
    positions = torch.randperm(count, generator=generator)[: max(1, count // 2)]
    rows = input_rows(layer, x, positions)
    computed = F.linear(rows, layer.weight.detach().flatten(1), layer.bias.detach())
    torch.testing.assert_close(computed, output_rows(layer, y, positions), rtol=0, atol=1e-12)
