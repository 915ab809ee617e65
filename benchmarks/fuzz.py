"""Random networks, compiled with and without elimination and compared with the masked ones.

``python -m benchmarks.fuzz [--examples 3000] [--seed 0]``. Every network is drawn by hypothesis
(`benchmarks.random_models`) and compared by the oracle of the coverage sweep, in double precision to 1e-8, in eval and
in train mode, gradients, running statistics and feature taps included. Must reach: no wrong output. A network that
can't be compiled must be refused with an `InputError`; any other error counts as wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor, nn

import sgfx
from benchmarks.oracle import Run, compare, mask, run
from benchmarks.random_models import networks, taps
from passes.cut import cuts

TOLERANCE = 1e-8
CASES: dict[str, Any] = {
    "drawn": networks(),
    "groups": st.integers(2, 4),
    "ratio": st.sampled_from((0.5, 0.7, 0.8, 0.9, 0.95)),
}
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def examine(net: nn.Module, x: Tensor, groups: int, ratio: float) -> str:
    """Compile and compare; return what came of it, for counting.

    Raises:
        AssertionError: a compiled network differs from the masked one; the message has all that is needed to see why.
    """
    if not all(_works(net, x, training) for training in (False, True)):
        return "not a network"
    smalls = {}
    try:
        for eliminate in (False, True):
            smalls[eliminate] = sgfx.compile(net, groups=groups, ratio=ratio, example_inputs=x, eliminate=eliminate)
    except sgfx.InputError as error:
        return "nothing to compress" if "nothing to compress" in str(error) else "refused"
    assert sgfx.plans(smalls[False]) == sgfx.plans(smalls[True]), "elimination changed the plans"
    masked = mask(net, smalls[False])
    for training in (False, True):
        expected = watched(masked, x, training)
        for eliminate, small in smalls.items():
            try:
                found = compare(expected, watched(small, x, training), small, cuts(small))
            except ValueError:
                return "not finite"
            where = f"{'train' if training else 'eval'} mode, eliminate={eliminate}, groups={groups}, ratio={ratio}"
            assert found.largest <= TOLERANCE, f"{where}: {found}\n{small}"
    return "exact, with elimination" if cuts(smalls[True]) else "exact"


def watched(model: nn.Module, x: Tensor, training: bool) -> Run:
    """Run a network; what its feature taps see counts as output."""
    for tap in taps(model):
        tap.seen.clear()
    found = run(model, (x,), training=training)
    for tap in taps(model):
        found.outputs.extend(tap.seen)
    return found


def _works(net: nn.Module, x: Tensor, training: bool) -> bool:
    """Whether the network runs at all: an operation in place may break the backward pass."""
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        found = run(net, (x,), training=training)
        return all(bool(output.isfinite().all()) for output in found.outputs)
    except RuntimeError:
        return False
    finally:
        net.load_state_dict(state)


def fuzz(examples: int, seed: int = 0) -> Counter[str]:
    """Examine `examples` random networks and count what came of them."""
    counts: Counter[str] = Counter()

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=HEALTH,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(**CASES)
    def one(drawn: tuple[nn.Module, Tensor], groups: int, ratio: float) -> None:
        counts[examine(*drawn, groups, ratio)] += 1

    one()
    return counts


def main() -> None:
    """Fuzz, print the counts, and exit with 1 on a wrong output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=3000, help="networks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts = fuzz(options.examples, options.seed)
    print(
        f"{counts.total()} networks, no wrong output: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())
    )
    sys.exit(counts.total() < options.examples)


if __name__ == "__main__":
    main()
