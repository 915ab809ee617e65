"""What stands between packed layers becomes steps of one program, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sgfx
from passes.freezing.arranging.stepping import steps_of
from passes.kernel.codegen.target import supported
from passes.kernel.packed_chain import PackedChain

pytestmark = pytest.mark.skipif(supported() is not None, reason=str(supported()))
SIZES = ((1, 3, 20, 17), (3, 3, 9, 12), (16, 3, 6, 7))


class Net(nn.Module):
    """Two layers, and what a test puts between them."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor], *parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.parts, self.between = nn.ModuleList(parts), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


class Gate(nn.Module):
    """Squeeze-and-excite, as torchvision and timm write it."""

    def __init__(self, inside: nn.Module, outside: nn.Module, by_mean: bool) -> None:
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.inside, self.outside, self.by_mean = inside, outside, by_mean

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True) if self.by_mean else self.pool(x)
        gate = self.outside(self.fc2(self.inside(self.fc1(pooled))))
        return x * gate if self.by_mean else gate * x


def call(net: Net, x: Tensor) -> Tensor:
    for part in net.parts:
        x = part(x)
    return x


def chains(fast: nn.Module) -> list[PackedChain]:
    return [module for module in fast.modules() if isinstance(module, PackedChain)]


def frozen(net: nn.Module) -> nn.Module:
    """Frozen with the kernel, and compared with eval in fp64 on pictures of several sizes and batches."""
    net = net.eval().requires_grad_(False)
    fast = sgfx.freeze(net, torch.randn(SIZES[0]), strategy="kernel", progress=False)
    wide = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    before = [fast(x.float()) for x in wide]
    net.double()
    for x, result in zip(wide, before, strict=True):
        torch.testing.assert_close(result.double(), net(x), rtol=1e-5, atol=1e-5)
        last = x.float().contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(last), result, rtol=0, atol=0)
    return fast


PARTS = {
    "gate": lambda: Net(call, Gate(nn.ReLU(), nn.Sigmoid(), False)),
    "hard gate": lambda: Net(call, Gate(nn.SiLU(inplace=True), nn.Hardsigmoid(), True)),
    "depthwise layer with a stride": lambda: Net(call, nn.Conv2d(8, 8, 5, 2, 2, groups=8), nn.Hardswish()),
    "depthwise layer with a wide stride": lambda: Net(call, nn.Conv2d(8, 8, 3, 3, groups=8)),
    "largest": lambda: Net(call, nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "largest, one after the other": lambda: Net(call, nn.MaxPool2d((2, 3), (1, 2), (1, 0), dilation=(2, 1))),
    "means": lambda: Net(call, nn.AvgPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2, 1, divisor_override=3)),
    "activations": lambda: Net(call, nn.ReLU6(), nn.SiLU(), nn.Hardsigmoid(), nn.Sigmoid()),
    "product": lambda: Net(lambda net, x: net.parts[0](x) * torch.sigmoid(x), nn.Conv2d(8, 8, 1)),
    "sum": lambda: Net(lambda net, x: F.relu(F.silu(x) + torch.sigmoid(x))),
    "in place": lambda: Net(lambda net, x: F.silu(x).mul_(torch.sigmoid(x)).add_(x)),
    "pixels all the way": lambda: Net(lambda net, x: F.adaptive_avg_pool2d(x, 1).mul(2 * x.mean((2, 3), True))),
}


@pytest.mark.parametrize("name", list(PARTS))
def test_what_stands_between_layers_is_in_their_program(name: str) -> None:
    fast = frozen(PARTS[name]())
    assert len(chains(fast)) == 1 or name == "pixels all the way"  # where a number is multiplied by
    assert not steps_of(fast) or name == "pixels all the way"


@pytest.mark.parametrize("by_mean", [False, True])
def test_a_classifier_reads_the_pixels(by_mean: bool) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            pixels = x.mean([2, 3]) if by_mean else torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
            return self.last(pixels)

    fast = frozen(Classifier())
    assert len(chains(fast)) == 1
    assert {"first", "last"} == {module.path for module in fast.modules() if hasattr(module, "path")}


def test_what_is_not_known_stays_between_programs() -> None:
    fast = frozen(Net(call, nn.SiLU(), nn.Softsign(), nn.SiLU()))
    kinds = [type(fast.get_submodule(node.target)).__name__ for node in fast.graph.nodes if node.op == "call_module"]
    assert kinds == ["PackedConv2d", "Softsign", "PackedChain"]


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 3), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    ids=["stride of three", "rounded up", "padding not counted"],
)
def test_poolings_that_the_kernel_does_not_know(pool: nn.Module) -> None:
    fast = frozen(Net(call, pool))
    assert fast.decisions.layers["parts.0"].way in ("library", "channels_last")


def test_a_pooling_is_given_as_it_was_decided() -> None:
    net = Net(call, nn.MaxPool2d(2)).eval()
    made = sgfx.freeze(net, torch.randn(SIZES[0]), progress=False).decisions
    assert made.layers["parts.0"].name == "kernel"
    again = sgfx.freeze(net, torch.randn(SIZES[0]), decisions=made.to_dict(), progress=False)
    assert again.decisions.layers == made.layers
    assert len(chains(again)) == 1


def test_a_picture_that_is_one_pixel_by_chance_is_no_gate() -> None:
    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.second(x))

    net = Chance().eval().requires_grad_(False)
    fast = sgfx.freeze(net, torch.randn(1, 3, 4, 4), strategy="kernel", progress=False)
    x = torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_gate_of_a_picture_that_is_one_pixel_in_the_example() -> None:
    net = Net(call, nn.Conv2d(8, 8, 3, 2, 1, groups=8), Gate(nn.ReLU(), nn.Sigmoid(), False)).eval()
    net = net.requires_grad_(False)
    fast = sgfx.freeze(net, torch.randn(1, 3, 2, 2), strategy="kernel", progress=False)
    for size in ((1, 3, 2, 2), (2, 3, 9, 5)):
        x = torch.randn(size)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_what_others_read_is_not_computed_in_place() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        y = F.silu(x)
        return y + torch.relu_(y) * y

    frozen(Net(between))


def test_compiled_and_exported() -> None:
    net = PARTS["gate"]().eval().requires_grad_(False)
    x = torch.randn(SIZES[0])
    fast = sgfx.freeze(net, x, strategy="kernel", progress=False)
    program = torch.export.export(fast, (x,))
    for other in (torch.compile(fast, backend="eager", fullgraph=True), program.module()):
        torch.testing.assert_close(other(x), fast(x), rtol=0, atol=0)
