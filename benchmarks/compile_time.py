"""How long `sgfx.compile` takes, how good its clustering is, and what memory it needs.

``python -m benchmarks.compile_time [--checkpoint resnet20-12fca82f.th]``. Must reach:

- ResNet-50 and DenseNet-201, 16 groups, 80 %: at most 6 s each on two cores;
- inertia summed over the layers within 1 % of ten k-means++ restarts, on random ResNet-50 weights (16 groups) and on a
  trained ResNet-20 (8 groups; the checkpoint of the akamaster repository);
- peak memory at most three times the model's parameters above what the model itself takes;
- time and memory linear in the number of layers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import nn

import models_zoo
import sgfx
from benchmarks.machine import describe_machine
from passes.compression.grouping import GROUPS, Grouping
from passes.compression.importance import IMPORTANCE, Importance
from passes.compression.selection import TARGETS
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.options.checks import checked_settings
from passes.options.settings import SETTINGS
from passes.pipeline import ANALYSIS
from tests.tools.clustering import inertia

CHECKPOINT = Path("../shared/data/resnet20-12fca82f.th")


def main() -> None:
    """Print the four measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="trained ResNet-20 (default: %(default)s)")
    checkpoint = parser.parse_args().checkpoint
    print(describe_machine())
    sgfx.compile(models_zoo.create("resnet20"), ratio=0.5)  # imports and first calls
    for name in ("resnet50", "densenet201"):
        model = models_zoo.create(name)
        before = time.process_time()
        times = [seconds(model) for _ in range(5)]
        processor = (time.process_time() - before) / len(times)
        spread = f"{min(times):.2f} to {max(times):.2f}"
        print(f"compile {name}: {statistics.median(times):.2f} s ({spread}), {processor:.2f} s of processor time")
    torch.manual_seed(0)
    print_inertia("random ResNet-50", models_zoo.create("resnet50"), groups=16)
    if checkpoint.exists():
        trained = models_zoo.load_checkpoint(models_zoo.create("resnet20"), checkpoint)
        print_inertia("trained ResNet-20", trained, groups=8)
    else:
        print(f"trained ResNet-20: not measured, {checkpoint} is not there")
    for name in ("resnet50", "densenet201"):
        print_memory(name, models_zoo.create, name)
    for depth in (25, 50, 100, 200):
        name = f"chain of {depth} convolutions"
        print(f"compile {name}: {statistics.median(seconds(chain(depth)) for _ in range(3)):.2f} s")
        print_memory(name, chain, depth)


def seconds(model: nn.Module) -> float:
    """Seconds that one compilation takes."""
    start = time.perf_counter()
    sgfx.compile(model, groups=16, ratio=0.8)
    return time.perf_counter() - start


def chain(depth: int) -> nn.Module:
    """Equal convolutions one after the other."""
    return nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(depth)))


def print_inertia(title: str, model: nn.Module, groups: int) -> None:
    """Compare the summed inertia of the compiler's clustering with ten k-means++ restarts on every layer."""
    settings = checked_settings(model, groups=groups, ratio=0.8)
    compilation = run_passes([*ANALYSIS, Importance()], Compilation(model, {SETTINGS: settings}))
    start = time.perf_counter()
    run_passes([Grouping()], compilation)
    ours_took = time.perf_counter() - start
    ours = {path: inertia(compilation[IMPORTANCE][path], found.labels) for path, found in compilation[GROUPS].items()}
    start = time.perf_counter()
    peer = {path: ten_restarts(compilation, path) for path in ours}
    peer_took = time.perf_counter() - start
    worst = max(ours[path] / peer[path] for path in ours) - 1
    summed = sum(ours.values()) / sum(peer.values()) - 1
    print(
        f"inertia, {title}, {groups} groups: {100 * summed:+.2f} % of ten k-means++ restarts (worst layer "
        f"{100 * worst:+.1f} %), {ours_took:.2f} s against {peer_took:.2f} s"
    )


def ten_restarts(compilation: Compilation, path: str) -> float:
    """Inertia of a layer with ten k-means++ restarts, of another seed than the compiler's."""
    vectors = compilation[IMPORTANCE][path]
    means = KMeans(compilation[TARGETS][path].groups, n_init=10, random_state=1).fit(vectors.numpy())
    return inertia(vectors, torch.from_numpy(means.labels_).long())


def print_memory(title: str, build: Callable[..., nn.Module], *options: str | int) -> None:
    """Peak memory of a compilation above what the process with the model held before, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(queue, build, *options))
    process.start()
    above, parameters = queue.get(timeout=300)
    process.join()
    print(f"peak memory, {title}: {above / parameters:.2f} times its parameters ({parameters / 2**20:.0f} MiB)")


def measure_memory(
    queue: multiprocessing.Queue[tuple[int, int]], build: Callable[..., nn.Module], *options: str | int
) -> None:
    """Put the peak above the start and the size of the parameters, in bytes, into `queue`."""
    sgfx.compile(models_zoo.create("resnet20"), ratio=0.5)
    model = build(*options)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
    small = sgfx.compile(model, groups=16, ratio=0.8)
    above = status("VmHWM") - before
    del small
    queue.put((above, sum(p.numel() * p.element_size() for p in model.parameters())))


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
