"""Numbers are of the right type and in their range, whoever's numbers they are."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from passes.errors import InputError
from passes.options.ranges import (
    checked_integer,
    checked_number,
    checked_ratio,
    checked_step,
    is_integer,
    meant_as_share,
)


@pytest.mark.parametrize(
    ("value", "is_one"), [(3, True), (np.int64(3), True), (True, False), (3.0, False), ("3", False)]
)
def test_integers_are_of_any_library_and_no_bools(value, is_one):
    assert is_integer(value) is is_one
    if is_one:
        made = checked_integer(value, "n", least=3, below=4)
        assert (made, type(made)) == (3, int)
    else:
        with pytest.raises(TypeError, match=f"^n must be an integer, not {value!r}$"):
            checked_integer(value, "n", least=3)


@pytest.mark.parametrize("value", [2, np.float32(2), Fraction(2)])
def test_numbers_are_of_any_library(value):
    made = checked_number(value, "x", least=2, most=2)
    assert (made, type(made)) == (2.0, float)


@pytest.mark.parametrize("value", [True, "2", None, 2j, torch.tensor(2.0)])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"^x must be a number, not "):
        checked_number(value, "x", least=0)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        ({"least": 0, "below": 1}, (0, 0.999), (-1e-9, 1), "at least 0 and below 1"),
        ({"above": 0, "most": 1}, (1e-9, 1), (0, 1.001), "above 0 and at most 1"),
        ({"least": 2}, (2, 1e300), (1.9, math.inf), "at least 2 and finite"),
        ({"above": 2}, (2.1,), (2, math.inf), "above 2 and finite"),
    ],
)
def test_bounds_are_what_they_say(bounds, inside, outside, said):
    for value in inside:
        assert checked_number(value, "x", **bounds) == value
    for value in (*outside, math.nan, -math.inf):
        with pytest.raises(InputError, match=f"^x must be {said}, not {value}; why$"):
            checked_number(value, "x", **bounds, hint="; why")


@pytest.mark.parametrize(
    ("value", "below", "message"),
    [(0, None, "n must be at least 1, not 0; why"), (9, 9, "n must be at least 1 and below 9, not 9; why")],
)
def test_integers_out_of_range_say_the_range(value, below, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        checked_integer(value, "n", least=1, below=below, hint="; why")


@pytest.mark.parametrize(("given", "meant"), [(80, "0.8"), (2, "0.02"), (99.5, "0.995")])
def test_shares_may_have_been_meant_as_percent(given, meant):
    with pytest.raises(
        InputError, match=f"ratio must be at least 0 and below 1, not {given}: .*; did you mean {meant}"
    ):
        checked_ratio(given, "ratio")
    with pytest.raises(InputError, match=f"step must be above 0 and below 1, not {given}: .*; did you mean {meant}"):
        checked_step(given)
    assert meant_as_share(1) == meant_as_share(100) == meant_as_share(math.nan) == ""
    assert (checked_ratio(0, "ratio"), checked_step(0.05)) == (0.0, 0.05)
