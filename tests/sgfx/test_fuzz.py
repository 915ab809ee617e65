"""Random networks: none may be compiled wrongly, and most must be compiled at all."""

import pytest

from benchmarks.fuzz import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_networks_equal_the_masked_ones():
    counts = fuzz(300, seed=1)
    assert counts.total() >= 300
    assert counts["refused"] == 0
    assert counts["exact"] + counts["exact, with elimination"] > 0.6 * counts.total()
    assert counts["exact, with elimination"] > 0.2 * counts.total()
