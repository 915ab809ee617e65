"""Packed layers and the operation: tracing, copying, files; several threads, forked and spawned processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes import kernel
from passes.errors import InputError
from passes.freezing.choosing.packing import pack_layer
from passes.kernel import Margins, PackedLinear, Placement, tilings
from passes.kernel.codegen.target import Target, supported

pytestmark = pytest.mark.skipif(supported() is not None, reason=str(supported()))


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(12, 20, 3, 2, 1)


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def arguments(layer: kernel.PackedConv2d, x: Tensor) -> tuple[object, ...]:
    tables = (layer.weight, layer.bias, layer.inputs, layer.ends, layer.filters, layer.blocks)
    return x, None, *tables, [20, 12, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1], "relu", [0] * 9, [14, 4]


def test_a_batch_norm_is_folded_in(conv: nn.Conv2d) -> None:
    norm = nn.BatchNorm2d(20).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 12, 15, 15)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    packed = pack_layer(conv, scale=scale, shift=norm.bias - norm.running_mean * scale, activation="relu")
    with torch.no_grad():
        torch.testing.assert_close(packed(x), F.relu(norm(conv(x))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_dense_and_depthwise_layers(groups: int) -> None:
    layer = nn.Conv2d(12, 24, (3, 5), padding="same", groups=groups)
    x = torch.randn(2, 12, 15, 9)
    with torch.no_grad():
        torch.testing.assert_close(pack_layer(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (64, 12), (2, 3, 12), (0, 12)])
def test_linear_layers(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(12, 20)
    x, more = torch.randn(shape), torch.randn(*shape[:-1], 20)
    packed = pack_layer(layer, activation="silu")
    assert type(packed) is PackedLinear
    with torch.no_grad():
        torch.testing.assert_close(packed(x, more), F.silu(layer(x) + more), rtol=1e-5, atol=1e-5)


def test_opcheck(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv, activation="relu")
    torch.library.opcheck(torch.ops.sgfx.conv2d.default, arguments(packed, torch.randn(2, 12, 15, 15)))


def test_writing_into_a_range_of_channels(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv, activation="relu")
    wide, x = torch.full((2, 30, 8, 8), 7.0), torch.randn(2, 30, 15, 15)
    expected = packed(x[:, 4:16].contiguous())
    packed.write(wide[:, 6:26], x[:, 4:16])
    assert torch.equal(wide[:, 6:26], expected)
    assert wide[:, :6].eq(7).all()
    assert wide[:, 26:].eq(7).all()
    with pytest.raises(InputError, match=r"out must be \[2, 20, 8, 8\] with contiguous images, not \[2, 30, 8, 8\]"):
        packed.write(wide, x[:, 4:16])
    torch.library.opcheck(torch.ops.sgfx.conv2d_out.default, (*arguments(packed, x[:, 4:16]), wide[:, 6:26]))


def test_compile_keeps_what_was_written(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv, activation="relu")

    def twice(x: Tensor) -> Tensor:
        wide = x.new_zeros(len(x), 40, 8, 8)
        packed.write(wide[:, :20], x)
        packed.write(wide[:, 20:], x)
        return wide

    x = torch.randn(2, 12, 15, 15)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x).repeat(1, 2, 1, 1))


def test_export_passes_through(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv, activation="relu")
    x = torch.randn(2, 12, 15, 15)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(nn.Sequential(packed), (x,), dynamic_shapes=({0: batch},))
    for images in (x, torch.randn(5, 12, 15, 15)):
        assert torch.equal(exported.module()(images), packed(images))


def test_compile_passes_through(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv, activation="relu")
    compiled = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 15, 15)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))


def test_copies_and_pickles_run(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv)
    x = torch.randn(1, 12, 9, 9)
    expected = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)


def test_a_new_form_is_followed(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv)
    x = torch.randn(1, 12, 9, 9)
    expected = packed(x)
    packed.form = replace(packed.form, placement=Placement(writes=Margins(1, 2, 3)))
    assert torch.equal(packed(x), Margins(1, 2, 3).apply(expected))


def test_tilings_differ_and_agree(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv)
    x = torch.randn(1, 12, 64, 64)
    expected, found = packed(x), tilings(packed, x.shape)
    assert len(found) > 1
    for tiling in found:
        packed.form = replace(packed.form, tiling=tiling)
        assert torch.equal(packed(x), expected)


def test_refusals(conv: nn.Conv2d) -> None:
    packed = pack_layer(conv)
    with pytest.raises(InputError, match=r"has no gradient. Call it under torch.no_grad\(\)"):
        packed(torch.zeros(1, 12, 9, 9, requires_grad=True))
    with pytest.raises(InputError, match=r"the weight is torch.float64"):
        packed.double()(torch.zeros(1, 12, 9, 9))
    with pytest.raises(InputError, match="'gelu' is not one the kernel can fuse"):
        pack_layer(conv, activation="gelu")


def test_registers_are_divided_among_filters_and_pixels() -> None:
    wide, narrow = Target(16, 32, "", ""), Target(8, 16, "", "")
    assert [wide.most_vectors(filters) for filters in range(1, 9)] == [12, 10, 7, 6, 4, 4, 3, 3]
    assert [narrow.most_vectors(filters) for filters in range(1, 9)] == [7, 5, 3, 3, 2, 2, 1, 1]
    assert (wide.most_filters, narrow.most_filters) == (8, 6)


@pytest.mark.usefixtures("two_threads")
def test_two_python_threads_call_one_layer_at_once() -> None:
    call_from_two_threads()


def call_from_two_threads() -> None:
    torch.manual_seed(0)
    packed = pack_layer(nn.Conv2d(16, 16, 3, padding=1), activation="relu")
    inputs = [torch.randn(1, 16, 28, 28), torch.randn(2, 16, 14, 14)]
    expected = [packed(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        wrong.extend(index for _ in range(200) if not torch.equal(packed(inputs[index]), expected[index]))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


PROCESSES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from passes.freezing.choosing.packing import pack_layer

class Images(Dataset):
    def __init__(self, packed):
        self.packed = packed
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return self.packed(torch.full((1, 16, 28, 28), float(index)))

if __name__ == "__main__":
    from tests.passes.kernel.test_kernel_layers import call_from_two_threads

    torch.manual_seed(0)
    torch.set_num_threads(2)
    packed = pack_layer(nn.Conv2d(16, 16, 3, padding=1))
    images = Images(packed)
    expected = [images[index] for index in range(3)]  # parallel work in the parent, before it forks
    for context in {contexts}:
        loader = DataLoader(images, batch_size=None, num_workers=1, multiprocessing_context=context)
        assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True)), context
    call_from_two_threads()
"""


@pytest.mark.parametrize("context", [["fork"], ["spawn"]], ids=["fork", "spawn"])
def test_workers_of_a_data_loader_under_any_threading_layer(context: list[str], tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES.replace("{contexts}", repr(context)))
    root = Path(__file__).parents[3]
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
