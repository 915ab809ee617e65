"""The networks of `benchmarks.latency`, every form in which one is run, and their times in interleaved rounds.

A network is compiled with 16 groups, convolutions at 0.8 and linear layers at 0.6. All weights are random, for want of
trained ones: the groups that the compiler finds in them are as uneven as they come, from one filter to several hundred.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models_zoo
import sgfx
from benchmarks.channel_pruning import pruned_channels, pruned_everywhere
from passes.layers.grouped import Grouped
from sgfx.reporting.counting import count_macs

THREADS = 2
SIZE_OF_PRODUCT = 1024
PAUSE = 0.1  # seconds, after which idle threads no longer spin
Run = Callable[[], object]


def efficientnet_b0() -> nn.Module:
    """torchvision's, with random weights."""
    import torchvision

    model: nn.Module = torchvision.models.efficientnet_b0(weights=None)
    return model


@dataclass(frozen=True)
class Network:
    """A network, the size of its images, and what the compiler leaves dense besides the stem."""

    title: str
    build: Callable[[], nn.Module]
    size: int = 224
    ignore: tuple[str, ...] = ()


NETWORKS = {
    "resnet50": Network("ResNet-50", lambda: models_zoo.create("resnet50"), ignore=("*downsample*",)),
    "resnet50_all": Network("ResNet-50, all but the stem", lambda: models_zoo.create("resnet50")),
    "densenet201": Network("DenseNet-201", lambda: models_zoo.create("densenet201")),
    "resnet56": Network("ResNet-56 (CIFAR)", lambda: models_zoo.create("resnet56"), size=32),
    "efficientnet_b0": Network("EfficientNet-B0", efficientnet_b0),
}


@dataclass
class Case:
    """A dense network, the compiled one, and a batch of images."""

    network: Network
    dense: nn.Module
    small: nn.Module
    images: Tensor

    def macs(self, model: nn.Module) -> int:
        """Multiply-adds of a model for one image."""
        return count_macs(model, (self.images[:1],))[""]


def make_case(name: str, batch: int) -> Case:
    """Build and compile a network: the same one in every process."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    network = NETWORKS[name]
    dense = network.build().eval().requires_grad_(False)
    small = sgfx.compile(dense, groups=16, ratio=0.8, linear_ratio=0.6, ignore=list(network.ignore))
    return Case(network, dense, small.eval(), torch.randn(batch, 3, network.size, network.size))


def dense_eager(case: Case) -> Run:
    """As it is."""
    return lambda: case.dense(case.images)


def dense_channels_last(case: Case) -> Run:
    """With the channels last in memory."""
    model = copy.deepcopy(case.dense).to(memory_format=torch.channels_last)
    images = case.images.to(memory_format=torch.channels_last)
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Run:
    """Compile with inductor, which may freeze the weights."""
    program = torch.compile(copy.deepcopy(model), options={"freezing": True})
    program(images)
    return lambda: program(images)


def dense_onnx(case: Case) -> Run:
    """In ONNX Runtime, with two threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense.onnx"
        sgfx.export(case.dense, file, case.images)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: case.images.numpy()}
    return lambda: session.run(None, feed)


def blocks(case: Case) -> Run:
    """The compiled model, lowered block by block: a library convolution for each group."""
    model = copy.deepcopy(case.small)
    for module in model.modules():
        if isinstance(module, Grouped):
            module.form = "blocks"
    return lambda: model(case.images)


def channel_pruned(case: Case) -> nn.Module:
    """Torch-Pruning's result at the MACs of the compiled model; ResNet-56 only within its blocks, as the tool can."""
    share = case.macs(case.small) / case.macs(case.dense)
    prune = pruned_channels if case.network.size == 32 else pruned_everywhere
    with torch.enable_grad():
        model = copy.deepcopy(case.dense).requires_grad_(True)  # the tool follows gradients
        return prune(model, share, case.images[:1])[0].eval().requires_grad_(False)


@dataclass
class Form:
    """A form to be timed.

    Attributes:
        run: one call.
        macs: multiply-adds for one image.
        seconds: what making it took.
    """

    run: Run
    macs: int
    seconds: float


def make_forms(case: Case, log: Callable[[str], None]) -> tuple[dict[str, Form], dict[str, str]]:
    """Every form of a case, and, of those that can't be made, why."""
    macs, small_macs = case.macs(case.dense), case.macs(case.small)
    makers: dict[str, Callable[[], tuple[Run, int]]] = {
        "dense eager": lambda: (dense_eager(case), macs),
        "dense channels_last": lambda: (dense_channels_last(case), macs),
        "dense compiled": lambda: (compiled(case.dense, case.images), macs),
        "dense ONNX Runtime": lambda: (dense_onnx(case), macs),
        "dense frozen": lambda: (frozen(case.dense, case.images), macs),
        "block by block": lambda: (blocks(case), small_macs),
        "frozen": lambda: (frozen(case.small, case.images), small_macs),
    }
    pruned: dict[str, Any] = {}

    def of_pruned(make: Callable[[nn.Module], Run]) -> Callable[[], tuple[Run, int]]:
        def maker() -> tuple[Run, int]:
            if not pruned:
                pruned["model"] = channel_pruned(case)
            return make(pruned["model"]), case.macs(pruned["model"])

        return maker

    makers["pruned eager"] = of_pruned(lambda model: lambda: model(case.images))
    makers["pruned compiled"] = of_pruned(lambda model: compiled(model, case.images))
    found, failed = {}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            with torch.no_grad():
                run, work = make()
                run()
            found[name] = Form(run, work, time.perf_counter() - start)
            log(f"{name}: made in {found[name].seconds:.0f} s")
        except Exception as error:  # a peer that fails is a result too
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
            log(f"{name}: {failed[name]}")
    return found, failed


def frozen(model: nn.Module, images: Tensor) -> Run:
    """Frozen by `sgfx.freeze`; a compiled model must not take decisions that came with it."""
    form = sgfx.freeze(model, images)
    return lambda: form(images)


def time_forms(name: str, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Time every form of a network, one after the other in every round, and the matrix product among them.

    Each is called twice, and the second call counts: what the other forms left in the caches is gone by then. Threads
    of theirs that still spin (ONNX Runtime's do, on a core that the next form needs) are waited for.

    Args:
        name: of the network.
        batch: images in a call.
        rounds: at most.
        seconds: that the rounds may take, after the third.

    Returns:
        Milliseconds of every form in every round, what was left out and why, MACs, sizes of groups.
    """
    case = make_case(name, batch)
    forms, failed = make_forms(case, lambda line: print(f"  {line}", flush=True))
    square = torch.randn(2, SIZE_OF_PRODUCT, SIZE_OF_PRODUCT)
    runs: dict[str, Run] = {key: form.run for key, form in forms.items()}
    runs["sgemm"] = lambda: torch.mm(square[0], square[1])
    times: dict[str, list[float]] = {key: [] for key in runs}
    start = time.perf_counter()
    with torch.no_grad():
        for index in range(rounds):
            for key, run in runs.items():
                times[key].append(1000 * second_call(run))
            if index >= 2 and time.perf_counter() - start > seconds:
                break
    return {
        "milliseconds": {key: times[key] for key in forms},
        "macs": {key: batch * form.macs for key, form in forms.items()},
        "made_in_seconds": {key: form.seconds for key, form in forms.items()},
        "failed": failed,
        "sgemm_gmacs": [SIZE_OF_PRODUCT**3 / ms / 1e6 for ms in times["sgemm"]],
        "filters_per_group": group_sizes(case.small),
    }


def second_call(run: Run) -> float:
    """Seconds of the second of two calls, after a pause."""
    time.sleep(PAUSE)
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def group_sizes(small: nn.Module) -> dict[str, float]:
    """Quartiles of the number of filters in a group, and the largest."""
    sizes = [layer.block_sizes[:, 0].float() for layer in small.modules() if isinstance(layer, Grouped)]
    every = torch.cat(sizes)
    low, middle, high = every.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {"quartile": low, "median": middle, "third_quartile": high, "most": float(every.max())}


def freezing_seconds(name: str, batch: int, decisions: dict[str, Any] | None) -> tuple[float, dict[str, Any]]:
    """Seconds that freezing a compiled network takes in this process, and what was decided."""
    case = make_case(name, batch)
    start = time.perf_counter()
    form = sgfx.freeze(case.small, case.images, decisions=decisions)
    seconds = time.perf_counter() - start
    made: Any = form.decisions
    return seconds, made.to_dict()


def peak_memory(name: str, batch: int, form: str, decisions: dict[str, Any] | None) -> int:
    """Peak of ten calls above what this process held just before the first, in bytes; `form` is "frozen" or "dense"."""
    case = make_case(name, batch)
    model = case.dense if form == "dense" else sgfx.freeze(case.small, case.images, decisions=decisions)
    case.dense = case.small = nn.Identity()  # what a server would not hold either
    with torch.no_grad():
        F.conv2d(torch.zeros(1, 8, 16, 16), torch.zeros(8, 8, 3, 3))  # the library's own start, for both
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what building left free would hide what calls take
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
        for _ in range(10):
            model(case.images)
        return status("VmHWM") - before


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
