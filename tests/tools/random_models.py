"""Random networks for fuzzing the compiler, drawn by hypothesis.

A network is a list of steps. Each step calls a module (an operation of `tests.tools.random_operations`, a torch layer,
or a network of its own kind) on values that came before: residuals, concatenations, shared modules and modules called
with several shapes come out of the wiring. Shapes are not worked out but seen: every step is run as it is drawn, and
left out if it does not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tools.oracle import prepare
from tests.tools.random_operations import LAYERS, OPERATIONS, Apply, Tokens

MOST = 4096  # entries of a value, so that a network stays small
Draw = Callable[[Any], Any]


@dataclass
class Outputs:
    """What some networks give."""

    last: Tensor
    others: list[Tensor]


class RandomNet(nn.Module):
    """Steps ``(name of a module, numbers of the values it is called with)``; value 0 is the input."""

    def __init__(self) -> None:
        """Start without steps."""
        super().__init__()
        self.wiring: list[tuple[str, tuple[int, ...]]] = []
        self.results: tuple[int, ...] = (-1,)
        self.dynamic = self.boxed = False

    def forward(self, x: Tensor) -> Any:
        """Run the steps and return one value, or several as a tuple."""
        if self.dynamic and float(x.detach().sum()) == float("inf"):  # control flow that no tracer follows
            return x
        values = [x]
        for name, operands in self.wiring:
            values.append(getattr(self, name)(*(values[number] for number in operands)))
        results = tuple(values[number] for number in self.results)
        if self.boxed:
            return Outputs(results[0], list(results[1:]))
        return results[0] if len(results) == 1 else results

    def extra_repr(self) -> str:
        """What `print` shows: who is called with what."""
        return f"{self.wiring} -> {self.results}" + (", dynamic" if self.dynamic else "")


class Tap:
    """A feature tap: keeps what it sees."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: object, output: Any) -> None:
        """Keep a copy of the output."""
        if isinstance(output, Tensor):
            self.seen.append(output.detach().clone())


def double(module: nn.Module, args: object, output: Any) -> Any:
    """A hook that changes values."""
    return output * 2


def halve_channels(module: nn.Module, args: object, output: Any) -> Any:
    """A hook that changes the shape."""
    return output[:, : max(1, output.shape[1] // 2)]


def flip_inputs(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """A hook that changes what a module is given."""
    return (args[0].flip(1), *args[1:])


def taps(model: nn.Module) -> list[Tap]:
    """The feature taps that hang on `model`, each once."""
    found = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return list({id(hook): hook for hook in found if isinstance(hook, Tap)}.values())


@st.composite
def networks(draw: Draw, least: int = 4, most: int = 14) -> tuple[nn.Module, Tensor]:
    """Draw a network in double precision, without dropout, and an input ``[3, 4, 4 to 6, 4 to 6]`` for it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = draw(st.integers(4, 6))
    x = torch.randn(3, 4, size, size, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**20)))
        net = _network(draw, x, draw(st.integers(least, most)), depth=1)
        prepare(net, seed=draw(st.integers(0, 2**20)))
    return net, x


def _network(draw: Draw, x: Tensor, length: int, depth: int) -> RandomNet:
    net = RandomNet().double()
    values = [x]
    if depth:
        _append(net, values, nn.Conv2d(x.shape[1], 8, 3, padding=1), (0,))
    for _ in range(length):
        step = _step(draw, net, values, depth)
        if step is not None and _append(net, values, *step):
            _hook(draw, net, values)
            _patch(draw, net, values)
    if depth and draw(st.integers(0, 3)) == 0:
        net.results = (-1, draw(st.integers(0, len(values) - 1)))
        net.boxed = draw(st.booleans())
    return net


def _step(
    draw: Draw, net: RandomNet, values: list[Tensor], depth: int
) -> tuple[nn.Module | str, tuple[int, ...]] | None:
    """Draw one step: a module, or the name of one that is there already, and its operands."""
    back = draw(st.sampled_from((1, 1, 1, 1, 2, 3, 5)))
    first = max(0, len(values) - back)
    x = values[first]
    kind = draw(st.sampled_from(("layer", "layer", "layer", "unary", "unary", "binary", "again", "nested", "tokens")))
    a, b = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    if kind == "layer":
        name = draw(st.sampled_from(sorted(LAYERS)))
        return LAYERS[name](tuple(x.shape), a, b), (first,)
    if kind == "binary":
        name = draw(st.sampled_from(sorted(OPERATIONS[2])))
        return Apply(name, 2, tuple(x.shape), a, b), (first, draw(st.integers(0, len(values) - 1)))
    if kind == "again" and net.wiring:
        name, operands = net.wiring[a % len(net.wiring)]
        return name, (*operands[:-1], first)
    if kind == "nested" and depth:
        inner = _network(draw, x.clone(), draw(st.integers(1, 4)), depth - 1)
        inner.dynamic = draw(st.integers(0, 2)) == 0
        return inner, (first,)
    if kind == "tokens" and x.dim() == 4:
        return Tokens(x.shape[1], a), (first,)
    name = draw(st.sampled_from(sorted(OPERATIONS[1])))
    return Apply(name, 1, tuple(x.shape), a, b), (first,)


def _append(net: RandomNet, values: list[Tensor], step: nn.Module | str, operands: tuple[int, ...]) -> bool:
    """Add a step and its value, if the module can be called like this and its output is fit to go on with."""
    module = getattr(net, step) if isinstance(step, str) else step.double()
    try:
        with torch.no_grad():
            value = module.eval()(*(values[number].clone() for number in operands))
            module.train()(*(values[number].clone() for number in operands))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    if not isinstance(value, Tensor) or not 0 < value.numel() <= MOST or value.dim() not in (2, 4) or len(value) != 3:
        return False
    name = step if isinstance(step, str) else f"step{len(net.wiring)}"
    if not isinstance(step, str):
        setattr(net, name, module)
    net.wiring.append((name, operands))
    values.append(value)
    return True


def _hook(draw: Draw, net: RandomNet, values: list[Tensor]) -> None:
    """Now and then hang a hook on the module of the last step, and take what it makes of the value."""
    if draw(st.integers(0, 11)):
        return
    name, _ = net.wiring[-1]
    if any(name == other for other, _ in net.wiring[:-1]):
        return
    module = getattr(net, name)
    kind = draw(st.sampled_from(("tap", "tap", "double", "halve", "flip")))
    if kind == "flip":
        module.register_forward_pre_hook(flip_inputs)
    else:
        module.register_forward_hook({"tap": Tap(), "double": double, "halve": halve_channels}[kind])
    _see_anew(net, values)


def flipped(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a replaced forward does: what the module did, with the channels the other way round."""
    return module.forward_before(*args, **kwargs).flip(1)


def _patch(draw: Draw, net: RandomNet, values: list[Tensor]) -> None:
    """Now and then replace the forward of a module within the last step, and take what it makes of the value."""
    if draw(st.integers(0, 11)):
        return
    name, _ = net.wiring[-1]
    inside = list(getattr(net, name).modules())
    module = inside[draw(st.integers(0, len(inside) - 1))]
    if any(name == other for other, _ in net.wiring[:-1]) or "forward" in module.__dict__:
        return
    before: Any = module.forward
    if draw(st.booleans()):  # as accelerate's hooks do it, or plainly
        module.forward_before = before
        module.forward = functools.update_wrapper(functools.partial(flipped, module), before)
    else:
        module.forward = lambda *args, **kwargs: before(*args, **kwargs).flip(1)
    try:
        _see_anew(net, values)
    except (RuntimeError, ValueError, IndexError, AssertionError, AttributeError):  # inside code that asks for more
        del module.forward


def _see_anew(net: RandomNet, values: list[Tensor]) -> None:
    """Take the value of the last step as it is now."""
    name, operands = net.wiring[-1]
    with torch.no_grad():
        values[-1] = getattr(net, name).eval()(*(values[number].clone() for number in operands))
    for tap in taps(net):
        tap.seen.clear()
