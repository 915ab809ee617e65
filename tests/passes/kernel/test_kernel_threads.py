"""Threads of a program wait for each other where one reads what another writes."""

from __future__ import annotations

import pytest
import torch

from passes.kernel import Block, Form, Geometry, Tiling
from passes.kernel.codegen.target import supported
from passes.kernel.layout.packing import Tables, pack
from passes.kernel.program import Step, Wires, execute, program
from passes.kernel.runtime import threads

pytestmark = [
    pytest.mark.skipif(supported() is not None, reason=str(supported())),
    pytest.mark.skipif(not threads.barrier(), reason="there is one thread where torch has no OpenMP"),
]
ROUNDS = 12


def tables(geometry: Geometry, blocks: list[tuple[int, int]]) -> Tables:
    """Random weights: blocks of so many filters, each reading so many of the first inputs."""
    start, made = 0, []
    for filters, inputs in blocks:
        weight = torch.randn(filters, inputs, *geometry.kernel_size)
        made.append(Block(torch.arange(start, start + filters), torch.arange(inputs), weight))
        start += filters
    return pack(made, None, geometry, 8)


def check(layers: list[Step], shape: tuple[int, ...]) -> None:
    """Two threads must compute what one does, every time; the memory they work in holds what was there before."""
    wires, outputs = [Wires(index) for index in range(len(layers))], [len(layers) - 1]
    alone, together = (program(layers, wires, outputs, [shape], team) for team in (1, 2))
    assert together.threads == 2
    inputs = [torch.randn(shape), torch.randn(shape)]
    expected = [execute(alone, [x])[0] for x in inputs]
    for index in range(ROUNDS):
        torch.testing.assert_close(execute(together, [inputs[index % 2]])[0], expected[index % 2])


def test_a_layer_waits_for_what_it_reads() -> None:
    # One thread has the block of eight filters to compute, some milliseconds; the other is done at once.
    torch.manual_seed(0)
    first, second = Geometry(9, 128, (3, 3)), Geometry(4, 9)
    whole = Tiling(strip=10**6, tasks=4)
    check(
        [
            Step(Form(first, tiling=whole), tables(first, [(8, 128), (1, 1)])),
            Step(Form(second, tiling=whole), tables(second, [(4, 9)])),
        ],
        (1, 128, 258, 258),
    )


def test_computing_waits_for_the_planes_that_are_copied() -> None:
    # Of one channel, which one thread copies, pixels of odd rows come last; the other thread could already read them.
    torch.manual_seed(0)
    geometry = Geometry(4, 1, (3, 3), stride=(2, 2))
    check([Step(Form(geometry, tiling=Tiling(strip=64, tasks=4)), tables(geometry, [(4, 1)]))], (1, 1, 2001, 2001))
