"""The two forms of an exported model in ONNX Runtime, batch 1, 224²: blocks against dense, interleaved; and file sizes.

``python -m benchmarks.export_forms``. The faster form is the default of `sgfx.export`. The uncompressed network runs
along, to show what the file of each form is worth. The second of two calls counts: threads of the session before still
spin during the first.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from torchvision.models import densenet121

import models_zoo
import sgfx
from benchmarks.latency_forms import second_call
from benchmarks.machine import describe_machine

CASES = {"ResNet-50": lambda: models_zoo.create("resnet50"), "DenseNet-121": densenet121}
ROUNDS = 31


def main() -> None:
    """Print the median of the ratios and their quartiles, milliseconds, and megabytes."""
    print(f"{describe_machine()}, ONNX Runtime {onnxruntime.__version__}; groups 16, ratio 0.8")
    for name, create in CASES.items():
        torch.manual_seed(0)
        original = create().eval()
        small = sgfx.compile(original, groups=16, ratio=0.8)
        with TemporaryDirectory() as folder:
            compare(name, original, small, Path(folder))


def compare(name: str, original: torch.nn.Module, small: torch.nn.Module, folder: Path) -> None:
    """Export, run and print one network."""
    image = torch.randn(1, 3, 224, 224)
    written = {
        "uncompressed": sgfx.export(original, folder / "uncompressed.onnx", image),
        "dense": sgfx.export(small, folder / "dense.onnx", image, form="dense"),
        "blocks": sgfx.export(small, folder / "blocks.onnx", image, form="blocks"),
    }
    sessions = {
        form: onnxruntime.InferenceSession(each.path, providers=["CPUExecutionProvider"])
        for form, each in written.items()
    }
    feeds = {form: {session.get_inputs()[0].name: image.numpy()} for form, session in sessions.items()}
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    for index in range(ROUNDS + 3):
        order = list(sessions)
        for form in order if index % 2 else reversed(order):  # a drift of the machine's speed favours none
            taken = second_call(partial(sessions[form].run, None, feeds[form]))
            if index >= 3:
                seconds[form].append(taken)
    for form, each in written.items():
        ratios = [a / b for a, b in zip(seconds[form], seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}, {form}: {1000 * statistics.median(seconds[form]):.1f} ms, {middle:.2f} times the dense form "
            f"(quartiles {low:.2f} to {high:.2f}), {each.size / 1e6:.1f} MB, "
            f"largest difference {each.max_difference:.1e} of {each.max_output:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
