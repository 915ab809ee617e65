"""How far tensors are apart: by hand, and for numbers that are none."""

import math

import pytest
import torch

from passes.models.comparing import difference, kinds

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("actual", "expected", "worst", "largest", "relative"),
    [
        ([1.0, -2.5], [1.0, -2.0], 0.5, 2.0, 0.25),
        ([0.0, 3.0], [0.0, 0.0], 3.0, 0.0, 3.0),  # there is nothing to set it against
        ([NAN, 1.0, INF], [NAN, 1.0, INF], 0.0, 1.0, 0.0),
        ([NAN, 4.0], [0.0, 4.0], INF, 4.0, INF),
        ([0.0, 4.0], [NAN, 4.0], INF, 4.0, INF),
        ([INF], [-INF], INF, 0.0, INF),
        ([INF, 1.0], [3.0, 1.0], INF, 3.0, INF),
        ([], [], 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_largest_difference_and_the_largest_value(actual, expected, worst, largest, relative, dtype):
    found = difference(torch.tensor(actual, dtype=dtype), torch.tensor(expected, dtype=dtype))
    assert (found.worst, found.largest, found.relative) == (worst, largest, relative)


def test_differences_are_not_lost_to_the_precision_of_the_tensors():
    big = torch.tensor([2**62, 0])
    assert difference(big, -big).worst == 2.0**63  # in int64 it would overflow
    half = torch.tensor([60000.0], dtype=torch.float16)
    assert difference(half, -half).worst == 120000.0  # in float16 it would be infinite


@pytest.mark.parametrize(
    ("dtype", "share"),
    [
        (torch.float64, 1e4 * 2.0**-52),
        (torch.float32, 1e4 * 2.0**-23),
        (torch.complex64, 1e4 * 2.0**-23),
        (torch.bfloat16, 0.1),
        (torch.int64, 0.0),
        (torch.bool, 0.0),
    ],
)
def test_rounding_is_a_share_of_the_largest_value(dtype, share):
    expected = torch.tensor([4, 0]).to(dtype)
    largest = float(expected.to(torch.float64 if not dtype.is_complex else torch.complex128).abs().max())
    found = difference(expected, expected)
    assert found.rounding == share * largest
    assert found.is_rounding


def test_what_is_above_rounding_is_no_rounding():
    expected = torch.tensor([8.0, 0.0], dtype=torch.float64)
    bound = difference(expected, expected).rounding
    for factor, is_rounding in ((0.99, True), (1.01, False), (INF, False)):
        assert difference(expected + torch.tensor([0.0, factor * bound]), expected).is_rounding is is_rounding


def test_kinds_are_shapes_and_types():
    assert kinds([torch.zeros(2, 3), torch.zeros(1, dtype=torch.int8)]) == [((2, 3), torch.float32), ((1,), torch.int8)]
