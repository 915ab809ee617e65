"""The CPU kernel on ResNet-50's regrouped layers, against the machine's matrix product, interleaved in one run.

``python -m benchmarks.kernel``. The network (224², convolutions pruned to 0.8 in 16 groups, stem and downsample layers
dense) has random weights; so the groups, found by the compiler as always, are of the uneven sizes that
random weights give: from one filter to several hundred. Must reach, summed over the layers: 0.68 of sgemm at batch 1,
0.60 at batch 16.

Each layer is timed with warm caches (one call before the one that counts) in two ways: *placed*, as in a frozen
network, where every picture has a margin beside it, those that 3×3 layers read have one above and below too, and
results are written into memory that is planned; and *alone*, from a plain picture to a new one, copies included. A
share is that of the rate of a large square ``torch.mm`` in the same round; given are medians over the rounds, and
quartiles and the best round for the sums. With ``OMP_NUM_THREADS=1``, the processor time of the one thread is measured,
which neighbours on a busy machine disturb least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import models_zoo
import sgfx
from benchmarks.machine import describe_machine
from passes.freezing.choosing.packing import pack_layer
from passes.kernel import Margins, Placement
from passes.layers.grouped import GroupedConv2d

BESIDE, AROUND = Margins(0, 0, 1), Margins(2, 1, 1)  # AROUND is what ResNet's 3×3 layers read in place
SIZE_OF_PRODUCT = 1024
CASES = ((1, 40), (16, 8))  # batch, rounds


@dataclass
class Layer:
    """One layer and its times, a round each, in seconds."""

    name: str
    shape: tuple[int, ...]
    layer: GroupedConv2d
    macs: int
    placed: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


def main() -> None:
    """Print a table per batch size, and the shares of sgemm."""
    print(describe_machine())
    network = regrouped_resnet50()
    for batch, rounds in CASES:
        layers, products = measure(network, batch, rounds)
        print(f"\nbatch {batch}, {rounds} rounds")
        print_layers(layers, products)
        for way in ("placed", "alone"):
            print_sum(way, layers, products)


def regrouped_resnet50() -> nn.Module:
    """Compile a ResNet-50 with random weights."""
    torch.manual_seed(0)
    dense = models_zoo.create("resnet50").eval()
    return sgfx.compile(dense, groups=16, ratio=0.8, linear_ratio=0.6, ignore=["*downsample*"])


def find_layers(network: nn.Module, batch: int) -> list[Layer]:
    """Run the network once to learn what each regrouped convolution reads."""
    found: list[Layer] = []

    def note(name: str, layer: GroupedConv2d, shape: torch.Size, pixels: int) -> None:
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        found.append(Layer(name, (batch, *shape[1:]), layer, batch * len(layer.weight) * kernel * pixels))

    handles = [
        layer.register_forward_hook(
            lambda layer, args, out, name=name: note(name, layer, args[0].shape, out[0, 0].numel())
        )
        for name, layer in network.named_modules()
        if isinstance(layer, GroupedConv2d)
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    return found


def measure(network: nn.Module, batch: int, rounds: int) -> tuple[list[Layer], list[float]]:
    """Time every layer in both ways, and the matrix product among them; return its median time of each round."""
    layers = find_layers(network, batch)
    pictures = {layer.shape: torch.randn(layer.shape) for layer in layers}
    calls = [(placed_call(layer, pictures[layer.shape]), alone_call(layer, pictures[layer.shape])) for layer in layers]
    square = torch.randn(2, SIZE_OF_PRODUCT, SIZE_OF_PRODUCT)
    products = []
    for _ in range(rounds):
        of_round = []
        for index, (layer, (placed, alone)) in enumerate(zip(layers, calls, strict=True)):
            layer.placed.append(seconds(placed))
            layer.alone.append(seconds(alone))
            if index % 7 == 0:
                of_round.append(seconds(lambda: torch.mm(square[0], square[1])))
        products.append(statistics.median(of_round))
    return layers, products


def placed_call(layer: Layer, picture: Tensor) -> Callable[[], object]:
    """A call of the layer, with the ReLU that follows it, with margins and into memory that is there already."""
    reads = AROUND if layer.name.endswith("conv2") else BESIDE
    writes = AROUND if layer.name.endswith("conv1") else BESIDE
    packed = pack_layer(layer.layer, activation="relu", placement=Placement(reads=reads, writes=writes))
    plane = reads.apply(picture)
    out = packed(plane)
    return lambda: packed.write(out, plane)


def alone_call(layer: Layer, picture: Tensor) -> Callable[[], object]:
    """A call of the layer, with the ReLU that follows it, from a plain picture to a plain picture."""
    packed = pack_layer(layer.layer, activation="relu")
    return lambda: packed(picture)


def seconds(call: Callable[[], object]) -> float:
    """Time the second of two calls."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    start = clock()
    call()
    return clock() - start


def print_layers(layers: list[Layer], products: list[float]) -> None:
    """Print one line per kind of layer: the mean over the layers that have its shape."""
    print(f"{'input':>16} {'filters':>7} {'kernel':>6} {'stride':>6} {'layers':>6} {'MMACs':>7}", end="")
    print(f" {'placed ms':>9} {'GMAC/s':>7} {'share':>5} {'alone ms':>9} {'share':>5}")
    kinds: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        conv = layer.layer
        kinds.setdefault((layer.shape, conv.out_channels, conv.kernel_size, conv.stride), []).append(layer)
    product = SIZE_OF_PRODUCT**3 / statistics.median(products)
    for (_, filters, kernel, stride), same in kinds.items():
        macs = statistics.mean(layer.macs for layer in same)
        placed, alone = (
            statistics.mean(statistics.median(getattr(layer, way)) for layer in same) for way in ("placed", "alone")
        )
        shape, kernel_size, step = "×".join(map(str, same[0].shape[1:])), kernel[0], stride[0]  # type: ignore[index]
        print(f"{shape:>16} {filters:>7} {kernel_size:>6} {step:>6} {len(same):>6} {macs / 1e6:>7.1f}", end="")
        print(f" {placed * 1e3:>9.3f} {macs / placed / 1e9:>7.1f} {macs / placed / product:>5.2f}", end="")
        print(f" {alone * 1e3:>9.3f} {macs / alone / product:>5.2f}")


def print_sum(way: str, layers: list[Layer], products: list[float]) -> None:
    """Print the share of sgemm summed over all layers: the median over the rounds, with quartiles."""
    macs = sum(layer.macs for layer in layers)
    times = [sum(of_round) for of_round in zip(*(getattr(layer, way) for layer in layers), strict=True)]
    shares = [macs / seconds / (SIZE_OF_PRODUCT**3 / product) for seconds, product in zip(times, products, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    rate = macs / statistics.median(times) / 1e9
    sgemm = SIZE_OF_PRODUCT**3 / statistics.median(products) / 1e9
    print(
        f"{way}: {macs / 1e9:.3f} GMACs in {1e3 * statistics.median(times):.2f} ms, {rate:.1f} GMAC/s; "
        f"sgemm {sgemm:.1f}; share {middle:.3f} (quartiles {low:.3f} to {high:.3f}, best {max(shares):.3f})"
    )


if __name__ == "__main__":
    main()
