"""Random networks: none may be compiled wrongly, and most must be compiled at all."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import sgfx
from benchmarks.fuzz import fuzz
from tests.tools.oracle import tensors_of
from tests.tools.random_models import networks


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_networks_equal_the_masked_ones():
    counts = fuzz(60, seed=1)  # thousands: python -m benchmarks.fuzz
    assert counts.total() >= 60
    assert counts["refused"] == 0
    assert counts["ill-conditioned"] == 0
    assert total(counts, "exact") > 0.6 * counts.total()
    asked = 2 / 3 * counts.total()  # the others are compiled without elimination
    assert total(counts, "exact, something eliminated") > 0.2 * asked
    assert total(counts, "", ", frozen") > 0.15 * counts.total()  # half of those that are compiled are
    assert total(counts, "", "frozen without its hooks") > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("dtype", "strategy", "tolerance"), [(torch.float64, "library", 1e-8), (torch.float32, "kernel", 1e-4)]
)
def test_random_networks_equal_their_frozen_forms(dtype, strategy, tolerance):
    frozen = []

    @seed(0)
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(networks(), st.sampled_from((0.5, 0.9)))
    def one(drawn, ratio):
        net, x = drawn[0].to(dtype).eval(), drawn[1].to(dtype)
        for module in net.modules():  # a frozen model has no hooks, and those of these networks change what they see
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        small = net
        with contextlib.suppress(sgfx.InputError):
            small = sgfx.compile(net, groups=3, ratio=ratio, example_inputs=x)
        with torch.no_grad():
            try:
                expected = tensors_of(small(x.clone()))  # some work on their input in place
            except RuntimeError:  # without its hooks it is no network
                return
            given_ = tensors_of(sgfx.freeze(small, x, strategy=strategy)(x.clone()))
        if all(each.isfinite().all() and each.abs().max() < 1e6 for each in expected):
            for a, b in zip(expected, given_, strict=True):
                assert (a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max()))
            frozen.append(1)

    one()
    assert len(frozen) > 15


def total(counts, start, end=""):
    return sum(number for what, number in counts.items() if what.startswith(start) and what.endswith(end))
