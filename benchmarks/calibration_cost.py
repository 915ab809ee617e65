"""What calibration costs: seconds, and memory above what the models and the images take.

``python -m benchmarks.calibration_cost``. Must reach, on two cores: ResNet-20 with 512 images of 32² in 30 seconds;
ResNet-50 with 64 images of 224² in 240 seconds; 3 GB. Weights and images are random: what is solved has the same size.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import models_zoo
import sgfx
from benchmarks.latency_forms import THREADS, status
from benchmarks.machine import describe_machine

CASES = (("resnet20", 32, 512), ("resnet50", 224, 64))


def main() -> None:
    """Measure each case in a process of its own."""
    print(describe_machine())
    for name, size, images in CASES:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, peak = pool.submit(cost, name, size, images).result()
        print(f"{name}, {images} images of {size}²: {seconds:.0f} s, at most {peak / 1e9:.2f} GB more than before")


def cost(name: str, size: int, images: int) -> tuple[float, int]:
    """Seconds that calibrating takes, and bytes of its peak above what this process held before."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dense, data = models_zoo.create(name).eval(), torch.randn(images, 3, size, size)
    small = sgfx.compile(dense, groups=16, ratio=0.5)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
    start = time.perf_counter()
    sgfx.calibrate(dense, small, data)
    return time.perf_counter() - start, status("VmHWM") - before


if __name__ == "__main__":
    main()
