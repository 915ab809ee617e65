"""Frozen models in the long run, in other processes, and under torch's own compilers."""

import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

import sgfx
from passes.kernel import supported
from tests.sgfx.test_freeze import IMAGES, Block, trained

needs_kernel = pytest.mark.skipif(supported() is not None, reason="the kernel does not run here")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def frozen():
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    return sgfx.freeze(small, IMAGES, strategy="kernel" if supported() is None else "library")


def alive():
    """How many tensors there are, the bytes that they hold, and those of all other objects of Python and numpy."""
    gc.collect()
    found = (each for each in gc.get_objects() if type(each) is torch.Tensor)  # other tests' too, sparse ones as well
    tensors = [each for each in found if each.layout == torch.strided]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return len(tensors), sum(storages.values()), tracemalloc.get_traced_memory()[0]


def test_a_thousand_calls_leave_nothing_behind(frozen):
    images = [torch.randn(1, 3, 16 + index, 20) for index in range(4)]

    def call(times):
        with torch.no_grad():
            for index in range(times):
                frozen(images[index % 4])
        return alive()

    tracemalloc.start()
    try:
        call(100)
        tensors, numbers, objects = call(100)
        after = call(1000)
    finally:
        tracemalloc.stop()
    assert after[:2] == (tensors, numbers)
    assert after[2] - objects < 2**15  # 32 bytes a call


SCRIPT = """
import torch
from torch.utils.data import DataLoader, Dataset
import sgfx
from tests.sgfx.test_freeze import Block, trained

class Outputs(Dataset):
    def __init__(self, frozen):
        self.frozen = frozen
    def __len__(self):
        return 3
    def __getitem__(self, index):
        with torch.no_grad():
            return self.frozen(torch.full((1, 3, 24, 24), float(index)))

if __name__ == "__main__":
    torch.set_num_threads(2)
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.5)
    frozen = sgfx.freeze(small, torch.randn(1, 3, 24, 24), strategy="kernel")
    outputs = Outputs(frozen)
    expected = [outputs[index] for index in range(3)]  # parallel work in the parent, before it forks
    for context in ("fork", "spawn"):
        loader = DataLoader(outputs, batch_size=None, num_workers=1, multiprocessing_context=context)
        for given, wanted in zip(loader, expected, strict=True):
            assert (given - wanted).abs().max() < 1e-6 * wanted.abs().max(), context
"""

LOADING = """
import sys
import torch
import passes.kernel

program, images, expected = sys.argv[1:]
found = torch.export.load(program).module()(torch.load(images))
assert "sgfx" not in sys.modules
assert torch.equal(found, torch.load(expected))
"""


def run(script, tmp_path, *arguments):
    file = tmp_path / "script.py"
    file.write_text(script)
    command = [sys.executable, str(file), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@needs_kernel
def test_workers_of_a_data_loader_run_a_frozen_model(tmp_path):
    run(SCRIPT, tmp_path)


def test_an_exported_frozen_model_runs_in_a_process_that_knows_the_kernel_alone(frozen, tmp_path):
    program = torch.export.export(frozen, (IMAGES,))
    torch.export.save(program, tmp_path / "frozen.pt2")
    torch.save(IMAGES, tmp_path / "images.pt")
    with torch.no_grad():
        torch.save(frozen(IMAGES), tmp_path / "expected.pt")
    run(LOADING, tmp_path, *(tmp_path / name for name in ("frozen.pt2", "images.pt", "expected.pt")))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_passes_through(frozen, backend):
    torch.compiler.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend=backend)
    with torch.no_grad():
        for images in (IMAGES, torch.randn(3, 3, 24, 16)):
            assert torch.allclose(compiled(images), frozen(images), atol=1e-5)
