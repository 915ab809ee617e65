"""Random networks, compiled with or without elimination and compared with the masked ones.

``python -m benchmarks.fuzz [--examples 3000] [--seed 0]``. Every network is drawn by hypothesis
(`tests.tools.random_models`) and compared by the oracle of the coverage sweep, in double precision to 1e-8, in eval and
in train mode, gradients, running statistics and feature taps included. Must reach: no wrong output. A network that
can't be compiled must be refused with an `InputError`; any other error counts as wrong. Where more than 1e-8 is found,
and the masked network itself moves as far when its input moves in the last place, the network is compiled and compared
once more with the epsilon of every norm at 1, so that no norm blows up rounding: the same graph, the same plans, and
nothing left to hide behind. What is too sensitive even then is counted as ill-conditioned.

Half of them are frozen then, in double precision for the library or in single precision for the kernel, and compared
with their eval form, on the example and on another input. A network in which a hook changes something must be refused,
and is frozen without its hooks.
"""

from __future__ import annotations

import argparse
import copy
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
from passes.layers.channel_cut import cuts
from tests.tools.oracle import Run, compare, mask, run, tensors_of
from tests.tools.random_models import networks, taps

TOLERANCE = 1e-8
CASES: dict[str, Any] = {
    "drawn": networks(),
    "groups": st.integers(2, 4),
    "ratio": st.sampled_from((0.5, 0.7, 0.8, 0.9, 0.95)),
    "eliminate": st.sampled_from((True, True, False)),
    "strategy": st.sampled_from((None, None, "library", "kernel")),
}
FROZEN_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def examine(net: nn.Module, x: Tensor, groups: int, ratio: float, eliminate: bool, strategy: str | None = None) -> str:
    """Compile and compare, and freeze with `strategy` unless it is None; return what came of it, for counting.

    Raises:
        AssertionError: a compiled network differs from the masked one; the message has all that is needed to see why.
    """
    found = _examine(net, x, groups, ratio, eliminate, strategy)
    if found != "ill-conditioned":
        return found
    for module in net.modules():
        if "eps" in module.__dict__:
            module.__dict__["eps"] = 1.0
    found = _examine(net, x, groups, ratio, eliminate, strategy)
    return found if found == "ill-conditioned" else f"{found} once its norms are tame"


def _examine(net: nn.Module, x: Tensor, groups: int, ratio: float, eliminate: bool, strategy: str | None) -> str:
    if not all(_works(net, x, training) for training in (False, True)):
        return "not a network"
    try:
        small = sgfx.compile(net, groups=groups, ratio=ratio, example_inputs=x, eliminate=eliminate)
    except sgfx.InputError as error:
        return "nothing to compress" if "nothing to compress" in str(error) else "refused"
    masked = mask(net, small)
    for training in (False, True):
        twin = copy.deepcopy(masked)
        expected = watched(masked, x, training)
        try:
            found = compare(expected, watched(small, x, training), small, cuts(small))
            if TOLERANCE < found.largest < 100 * sensitivity(twin, expected, x, training):
                return "ill-conditioned"
        except ValueError:
            return "not finite"
        where = f"{'train' if training else 'eval'} mode, eliminate={eliminate}, groups={groups}, ratio={ratio}"
        assert found.largest <= TOLERANCE, f"{where}: {found}\n{small}"
    exact = "exact, something eliminated" if cuts(small) else "exact"
    return exact if strategy is None else f"{exact}, {frozen(small, x, strategy)}"


def frozen(small: nn.Module, x: Tensor, strategy: str) -> str:
    """Freeze a compiled network, which is changed, and compare; return what came of it.

    Raises:
        AssertionError: the frozen form computes something else, or is refused for another reason than a hook.
    """
    dtype = torch.float32 if strategy == "kernel" else torch.float64
    small, x = small.to(dtype).eval(), x.to(dtype)
    what = "frozen"
    try:
        fast = sgfx.freeze(small, x, strategy=strategy)
    except sgfx.InputError as error:
        if "changes what the model computes" not in str(error):
            raise AssertionError(f"freeze, {strategy}: {error}\n{small}") from error
        for module in small.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        if not _runs(small, x):
            return "not frozen for its hooks"
        fast, what = sgfx.freeze(small, x, strategy=strategy), "frozen without its hooks"
    if "turn on rounding" in fast.decisions.note:  # type: ignore[union-attr, operator]
        return "frozen but for rounding"
    for inputs in (x, torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)):
        expected = _given_by(small, inputs)
        if not all(float(each.abs().max()) < 1e6 for each in expected):
            return "frozen, beyond comparison"
        worst = _apart(expected, _given_by(fast, inputs))
        if worst > FROZEN_TOLERANCE[dtype]:
            nudges = torch.finfo(dtype).eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            if worst < 100 * _apart(expected, _given_by(small, inputs * (1 + nudges))):
                return "frozen but for rounding"
            raise AssertionError(f"frozen, {strategy}: {worst}\n{small}")
    return what


def _given_by(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(x.clone()))  # some work on their input in place


def _apart(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest difference, relative where values are beyond 1."""
    pairs = zip(expected, actual, strict=True)
    return max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in pairs)


def _runs(net: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            net(x.clone())
    except (RuntimeError, ValueError, IndexError, AssertionError):  # as torch's modules say it
        return False
    return True


def sensitivity(masked: nn.Module, expected: Run, x: Tensor, training: bool) -> float:
    """How far the masked network itself moves when its input moves by a few units in the last place.

    A norm in train mode blows up the rounding of a channel that is constant, some 300 times; a few of them one after
    the other leave nothing but noise.
    """
    nudged = x * (1 + 1e-15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x))
    return compare(expected, watched(masked, nudged, training), masked, {}).largest


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
    def one(drawn: tuple[nn.Module, Tensor], **options: Any) -> None:
        counts[examine(*drawn, **options)] += 1

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
