"""Chains of packed layers against `F.conv2d` in fp64, and the memory that their tensors share."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import InputError
from passes.freezing.choosing.packing import pack_layer
from passes.kernel.codegen.target import supported
from passes.kernel.layout.memory import Arena
from passes.kernel.packed_chain import PackedChain
from passes.kernel.program import Wires

pytestmark = pytest.mark.skipif(supported() is not None, reason=str(supported()))


def random_chain(seed: int, length: int, channels: int = 10) -> tuple[PackedChain, list[nn.Conv2d]]:
    """Layers that keep the size of the picture, each reading and perhaps adding one of the tensors before."""
    torch.manual_seed(seed)
    convs, reads = [], []
    for index in range(length):
        size = int(torch.randint(0, 3, ()))
        convs.append(nn.Conv2d(channels, channels, 2 * size + 1, padding=size).requires_grad_(False))
        known = index + 1
        added = int(torch.randint(-1, known, ()))
        reads.append(Wires(int(torch.randint(max(0, known - 2), known, ())), None if added < 0 else added))
    outputs = sorted({int(torch.randint(0, length, ())), length - 1})
    return PackedChain([pack_layer(conv, activation="relu") for conv in convs], reads, outputs), convs


def reference(chain: PackedChain, convs: list[nn.Conv2d], x: Tensor) -> list[Tensor]:
    known = [x.double()]
    for conv, (read, added, _) in zip(convs, chain.wires, strict=True):
        y = F.conv2d(known[read], conv.weight.double(), conv.bias.double(), padding=conv.padding)  # type: ignore[union-attr]
        known.append(F.relu(y if added is None else y + known[added]))
    return [known[1 + index] for index in chain.outputs]


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([1, 5, 12]), st.integers(0, 3), st.integers(1, 2))
def test_chains_of_any_shape(seed: int, length: int, size: int, images: int, team: int) -> None:
    chain, convs = random_chain(seed, length)
    x, before = torch.randn(images, 10, size, size + 1), torch.get_num_threads()
    try:
        torch.set_num_threads(team)
        results = tensors(chain(x))
    finally:
        torch.set_num_threads(before)
    for result, expected in zip(results, reference(chain, convs, x), strict=True):
        torch.testing.assert_close(
            result.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() if images else 0)
        )


def test_layers_write_into_a_tensor_that_grows() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(8 + 4 * index, 4, 3, padding=1).requires_grad_(False) for index in range(3)]
    wires = [Wires(0, into=(0, 8 + 4 * index)) for index in range(3)]
    chain = PackedChain([pack_layer(conv) for conv in convs], wires, [])
    expected = torch.randn(2, 8, 5, 6)
    for other in (chain, torch.compile(chain, backend="aot_eager", fullgraph=True)):
        joined = torch.cat([expected[:, :8], torch.full((2, 12, 5, 6), torch.nan)], 1)
        with torch.no_grad():
            assert other(joined) == ()
        for conv in convs:
            expected = torch.cat([expected, conv(expected)], 1) if expected.shape[1] < 20 else expected
        torch.testing.assert_close(joined, expected)


@pytest.mark.parametrize("team", [1, 2, 3])
def test_images_are_shared_out_and_what_is_left_over_is_computed_together(team: int) -> None:
    chain, _ = random_chain(6, 7)
    x, before = torch.randn(7, 10, 9, 9), torch.get_num_threads()
    try:
        torch.set_num_threads(team)
        whole = tensors(chain(x))
        single = [tensors(chain(image)) for image in x.split(1)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, whole, map(torch.cat, zip(*single, strict=True))))
    left = 7 % team
    expected = [(1, 1)] + [(1, team)] * (team > 1) + [(left, team)] * (left > 1)
    assert sorted((shape[0], threads) for shape, threads in chain._programs._known) == sorted(expected)


def test_layers_of_batches_of_different_sizes() -> None:
    convs = [nn.Conv2d(10, 10, 1).requires_grad_(False) for _ in range(2)]
    chain = PackedChain([pack_layer(conv) for conv in convs], [Wires(0), Wires(1)], [0, 1])
    batches = torch.randn(2, 10, 5, 5), torch.randn(7, 10, 5, 5)
    for result, conv, batch in zip(tensors(chain(*batches)), convs, batches, strict=True):
        torch.testing.assert_close(result, conv(batch))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5)), max_size=30))
def test_what_is_needed_at_the_same_time_has_places_of_its_own(sizes: list[tuple[int, int]]) -> None:
    arena, alive = Arena(), {}
    for step, (size, life) in enumerate(sizes):
        for start in [start for start, (_, end) in alive.items() if end <= step]:
            arena.give(start)
            del alive[start]
        start = arena.take(size)
        assert start % 16 == 0
        assert start + size <= arena.size
        assert all(start + size <= other or other + taken <= start for other, (taken, _) in alive.items())
        alive[start] = (max(size, 1), step + life + 1)


def test_places_are_used_again() -> None:
    arena = Arena()
    first, second = arena.take(32), arena.take(32)
    arena.give(first)
    assert (arena.take(16), arena.take(16), arena.take(1)) == (0, 16, 64)
    assert second == 32


def test_traced_copied_pickled_and_moved() -> None:
    chain, _ = random_chain(3, 6)
    x = torch.randn(2, 10, 6, 6)
    expected = tensors(chain(x))
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    others = (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), compiled)
    for other in others:
        assert all(map(torch.equal, tensors(other(x)), expected))
    moved = chain.to(torch.float64).to(torch.float32)  # other memory: no address of before is used
    assert all(map(torch.equal, tensors(moved(x)), expected))


def test_memory_that_moves_under_the_same_tensors() -> None:
    chain, _ = random_chain(3, 6)
    x = torch.randn(2, 10, 6, 6)
    expected = tensors(chain(x))
    chain.share_memory()
    assert all(map(torch.equal, tensors(chain(x)), expected))


def test_a_negative_view() -> None:
    chain, _ = random_chain(3, 6)
    x = torch.randn(2, 10, 6, 6)
    assert all(map(torch.equal, tensors(chain(torch._neg_view(x))), tensors(chain(-x))))


def test_layers_that_are_given_other_tensors_or_forms() -> None:
    wires = [Wires(0), Wires(1), Wires(2, 1)]
    chain, other = (PackedChain([pack_layer(nn.Conv2d(6, 6, 3, padding=1)) for _ in wires], wires, [2]) for _ in "ab")
    x = torch.randn(2, 6, 7, 7)
    before, expected = chain(x), other(x)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert torch.equal(torch.func.functional_call(chain, state, (x,)), expected)
    assert torch.equal(chain(x), before)
    chain.load_state_dict(state, assign=True)
    del state
    assert torch.equal(chain(x), expected)
    for layer in (*chain.layers, *other.layers):
        layer.form = replace(layer.form, activation="relu")
    assert torch.equal(chain(x), other(x))
    assert not torch.equal(chain(x), expected)


def test_threads_and_a_forked_child() -> None:
    chain, _ = random_chain(4, 8)
    x = torch.randn(2, 10, 9, 9)
    expected, wrong = tensors(chain(x)), []

    def work() -> None:
        for _ in range(100):
            if not all(map(torch.equal, tensors(chain(x)), expected)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(torch.equal, tensors(chain(x)), expected)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_refusals() -> None:
    chain, _ = random_chain(5, 3)
    with pytest.raises(InputError, match=r"reads \[N, 10, H, W\], not \[N, 9, 6, 6\]"):
        chain(torch.zeros(1, 9, 6, 6))
    with pytest.raises(InputError, match=r"the input is torch.float64"):
        chain(torch.zeros(1, 10, 6, 6, dtype=torch.float64))
    with pytest.raises(InputError, match=r"Call them under torch.no_grad\(\)"):
        chain(torch.zeros(1, 10, 6, 6, requires_grad=True))
    with pytest.raises(InputError, match=r"the weight is torch.float64"):
        chain.double()(torch.zeros(1, 10, 6, 6))
