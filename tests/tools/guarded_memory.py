"""Run layers of every kind beside unmapped pages, as a program of its own: ``python -m tests.tools.guarded_memory``.

A tensor lies either at the end of its pages or at their start, so that reading or writing one number before or behind
it ends the process. The tables of the packed layers are put there too, and so is the memory that a program works in.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.freezing.choosing.packing import pack_layer
from passes.kernel import Margins, PackedConv2d, Placement, program, tilings
from passes.layers.grouped import GroupedConv2d, GroupedLinear
from passes.layers.plan import LayerPlan

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy with an unmapped page right before it, or right behind it."""
    size, page = max(tensor.nbytes, 1), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * page):
        assert _libc.mprotect(ctypes.c_void_p(guard), page, PROT_NONE) == 0
    _kept.append(memory)
    if not tensor.numel():
        return tensor
    offset = page + (pages * page - size if at_end else 0)
    made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return made.copy_(tensor)


def grouped(layer: nn.Module, labels: Sequence[int], inputs: int) -> nn.Module:
    """The layer with groups that read every third input, one of which reads none."""
    kind = GroupedLinear if isinstance(layer, nn.Linear) else GroupedConv2d
    keep = torch.arange(max(labels) + 1)[:, None] % 3 == torch.arange(inputs)[None] % 3
    keep[-1] = False
    return kind.from_dense(layer, LayerPlan.of(layer, labels=torch.tensor(labels), keep=keep, requested_ratio=0.5))


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Layers of every kind, each with shapes that leave rests of vectors, strips and blocks."""
    found: list[tuple[nn.Module, tuple[int, ...]]] = []
    for kernel, stride, padding, size in itertools.product((1, 3, (2, 5)), (1, 2), (0, 1), ((3, 7), (13, 30))):
        layer = nn.Conv2d(6, 19, kernel, stride, padding)
        if min(s + 2 * padding - k + 1 for s, k in zip(size, layer.kernel_size, strict=True)) >= 1:
            found += [(layer, (2, 6, *size)), (grouped(layer, [g % 5 for g in range(19)], 6), (1, 6, *size))]
    found += [(nn.Conv2d(6, 12, 3, padding=1, groups=groups), (3, 6, 9, 17)) for groups in (2, 6)]
    found += [(nn.Conv2d(6, 8, 3, dilation=2, padding=2), (1, 6, 11, 11))]
    for batch in (1, 3, 40):
        labels = [0, 1, 2, 3] * 3 + [0]
        found += [(nn.Linear(21, 13), (batch, 21)), (grouped(nn.Linear(21, 13), labels, 21), (batch, 21))]
    return found


def check(layer: nn.Module, shape: tuple[int, ...], at_end: bool) -> None:
    """One layer with each tiling that would be timed, with and without a residual."""
    x = torch.randn(shape)
    expected = layer(x)
    residual = torch.randn(expected.shape)
    packed: PackedConv2d = pack_layer(layer, activation="relu")
    for name, tensor in list(packed.named_buffers()):
        packed._buffers[name] = guarded(tensor, at_end)
    given, more = guarded(x, at_end), guarded(residual, at_end)
    pictures = shape if len(shape) == 4 else (*shape, 1, 1)
    for tiling in tilings(packed, pictures):
        packed.form = replace(packed.form, tiling=tiling)
        torch.testing.assert_close(packed(given), F.relu(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed(given, more), F.relu(expected + residual), rtol=1e-4, atol=1e-4)


def check_ends(at_end: bool) -> None:
    """A layer that keeps its inputs between ends."""
    layer, x, ends = nn.Conv2d(6, 19, 1), torch.randn(2, 6, 9, 14), torch.tensor([[-0.5, 0.5]] * 6)
    packed = pack_layer(layer, ends=ends)
    packed._buffers["ends"] = guarded(ends, at_end)
    torch.testing.assert_close(packed(guarded(x, at_end)), layer(x.clamp(-0.5, 0.5)), rtol=1e-4, atol=1e-4)


def check_margins(at_end: bool) -> None:
    """Layers that read and write planes with margins."""
    for reads, writes in itertools.product((Margins(2, 1, 1), Margins(0, 0, 3)), (Margins(1, 2, 3), Margins(2, 1, 1))):
        layer = nn.Conv2d(6, 19, 3, padding=1)
        x = torch.randn(2, 6, 9, 14)
        packed = pack_layer(layer, placement=Placement(reads=reads, writes=writes))
        result = packed(guarded(reads.apply(x), at_end))
        torch.testing.assert_close(writes.strip(result), layer(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def main() -> None:
    """Check all of it for memory that ends, and for memory that starts, at an unmapped page."""
    torch.manual_seed(0)
    for at_end in (True, False):
        program.empty = lambda shape, at_end=at_end: guarded(torch.full(shape, torch.nan), at_end)
        for layer, shape in layers():
            check(layer, shape, at_end)
        check_ends(at_end)
        check_margins(at_end)
    assert len(_kept) > 1000


if __name__ == "__main__":
    main()
