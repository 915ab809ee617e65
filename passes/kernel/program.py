"""Programs: steps that run one after the other in one call, and where their tensors lie.

Between two calls Python would first have to be fetched into the caches again, which the layers fill: some 20 µs, as
long as a small layer takes. So steps are planned once for inputs of one shape, as an array of `Call` in which only
addresses are missing. A call copies that array, fills them in, and hands it to the threads.

Results that are read within the program only, copied planes and tiles lie in one block of memory, the *arena*, which is
allocated for each call. What is not needed at the same time shares its place there.

A batch is shared out image by image: each thread takes one, and computes it with the program for a single image and an
arena of its own. No thread waits for another after each layer, and what a layer has written is still in the caches when
the next one reads it. Images that are left over when each thread has had as many are computed by all threads together.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.errors import InputError
from passes.kernel.form import Form, Plan, PlaneForm, compiled, plan, plan_plane
from passes.kernel.layout.memory import Arena, empty
from passes.kernel.layout.packing import Structure, Tables
from passes.kernel.runtime import threads
from passes.kernel.runtime.call_record import LAYER, PIXEL, Call

_WORDS, _ALONE = ctypes.sizeof(Call) // 8, Call.alone.offset // 8
_CALLS, _ARENA, _GIVEN = range(3)  # what addresses start from; of each tensor given, its address and its image stride


class Wires(NamedTuple):
    """Which tensors a step of a program works on. Their numbers: the inputs come first, then the steps' results.

    Attributes:
        reads: number of the tensor that it reads; of a wider one a layer reads the first channels.
        adds: number of what it adds, or multiplies by, or None.
        into: where it writes, if that is within one of the inputs: its number, and the first of the channels.
    """

    reads: int = 0
    adds: int | None = None
    into: tuple[int, int] | None = None


class Step(NamedTuple):
    """A step: how it is computed, and the tables that a layer has."""

    form: Form | PlaneForm
    tables: Tables | None = None

    def plan(self, shape: tuple[int, ...], has_second: bool, team: int) -> Plan:
        """The plan for inputs of `shape`, on `team` threads."""
        if isinstance(self.form, PlaneForm):
            return plan_plane(self.form, shape, has_second, team)
        structure = Structure(0) if self.tables is None else self.tables.structure()
        return plan(self.form, shape, has_second, structure, team)


class _Link(NamedTuple):
    """A word of the calls that is filled in later: what it starts from, and how many bytes are added."""

    word: int
    base: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Program:
    """Steps for inputs of one shape.

    Attributes:
        calls: int64, an array of `Call`, in which the addresses of tensors are missing that belong to a call.
        words, bases, offsets: int64 ``[n]``: which of its words, what they start from, and what is added to that.
        arena: size of the arena, in numbers.
        threads: threads that have something to do.
        out_shapes: shapes of the results that leave the program, margins included.
        folded: whether some layer puts the pictures of the batch one after the other, or would do so for a batch.
        kept: plans and steps: what the calls point to.
    """

    calls: NDArray[np.int64]
    words: NDArray[np.int64]
    bases: NDArray[np.int64]
    offsets: NDArray[np.int64]
    arena: int
    threads: int
    out_shapes: tuple[tuple[int, ...], ...]
    folded: bool
    kept: tuple[object, ...]


def program(
    steps: Sequence[Step], wires: Sequence[Wires], outputs: Sequence[int], shapes: Sequence[Sequence[int]], team: int
) -> Program:
    """Plan steps that run one after the other.

    Args:
        steps: in the order in which they run.
        wires: of each step.
        outputs: the steps whose results leave the program.
        shapes: of the inputs, margins included.
        team: number of threads.
    """
    known, plans = [tuple(shape) for shape in shapes], []
    wide = {each.into[0] for each in wires if each.into is not None}
    for step, (reads, adds, _) in zip(steps, wires, strict=True):
        if step.tables is not None:
            _check("weight", step.tables.weight)
        shape = known[reads]
        if reads in wide and isinstance(step.form, Form):
            shape = (shape[0], step.form.geometry.in_channels, *shape[2:])
        found = step.plan(shape, adds is not None, team)
        if adds is not None and known[adds] != found.residual_shape:
            raise InputError(f"the residual must be {list(found.residual_shape or ())}, not {list(known[adds])}")
        plans.append(found)
        known.append(found.out_shape)
    calls = (Call * len(plans))(*(each.template for each in plans))
    used = max(each.schedule.threads for each in plans)
    calls[0].steps, calls[0].wait = len(plans), threads.barrier() if used > 1 else 0
    for call, step in zip(calls, steps, strict=True):
        for name, tensor in () if step.tables is None else step.tables._asdict().items():
            setattr(call, name, tensor.data_ptr())
    given = {number: number for number in range(len(shapes))}
    given |= {len(shapes) + layer: len(shapes) + index for index, layer in enumerate(outputs)}
    links, arena = _placed(wires, plans, calls, given, known)
    words, bases, offsets = np.array(links, dtype=np.int64).T.copy()
    out_shapes, kept = tuple(plans[layer].out_shape for layer in outputs), (*plans, *steps)
    folded = any(each.schedule.folded for each in plans) or all(each.template.kind == PIXEL for each in plans)
    return Program(np.frombuffer(bytes(calls), np.int64), words, bases, offsets, arena, used, out_shapes, folded, kept)


def execute(
    program: Program, inputs: Sequence[Tensor], outs: Sequence[Tensor] | None = None, alone: int = 0, workers: int = 1
) -> Sequence[Tensor]:
    """Run a program.

    Args:
        program: for inputs of these shapes, or, with `alone`, for a single image.
        inputs: fp32 ``[N, C, H, W]`` on the CPU, margins included; copied unless each image is contiguous.
        outs: where to write, or None for new tensors. Each image must be contiguous, so a range of the channels of a
            wider tensor will do.
        alone: 0, or the number of images, each of which a thread computes alone.
        workers: threads among which they are shared out.

    Returns:
        The results that leave the program, margins included: `outs` if those were given.
    """
    if outs is None:
        outs = [empty((alone or shape[0], *shape[1:])) for shape in program.out_shapes]
    else:
        for out, shape in zip(outs, program.out_shapes, strict=True):
            _check_out(out, (alone or shape[0], *shape[1:]))
    numbers: list[int] = []
    for tensor in inputs:
        _check("input", tensor)
    given = (*map(_by_image, inputs), *outs)
    for tensor in given:
        if tensor.numel() == 0:
            return outs
        numbers += (tensor.data_ptr(), tensor.stride(0))
    arena = empty((workers * program.arena,))
    calls = np.empty((workers, len(program.calls)), np.int64)
    address, memory = calls.ctypes.data, arena.data_ptr()
    for worker, own in enumerate(calls):
        own[:] = program.calls
        bases = np.array([address + worker * own.nbytes, memory + worker * 4 * program.arena, *numbers])
        own[program.words] = bases[program.bases] + program.offsets
    calls[0, _ALONE] = alone
    threads.run(*compiled(), address, workers if alone else program.threads)
    return outs


def share_out(
    find: Callable[[Sequence[Sequence[int]], int], Program],
    inputs: Sequence[Tensor],
    outs: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Run layers for a batch: every thread as many images, the rest together.

    Args:
        find: gives the program for inputs of some shapes on some number of threads.
        inputs: see `execute`.
        outs: see `execute`.
    """
    images, team = inputs[0].shape[0], threads.available()
    even = images - images % team
    if images > 1 and even and all(x.shape[0] == images for x in inputs):  # layers of another batch may be among them
        single = find([(1, *x.shape[1:]) for x in inputs], 1)
        if not single.folded:
            results = [empty((images, *shape[1:])) for shape in single.out_shapes] if outs is None else outs
            execute(single, [x[:even] for x in inputs], [out[:even] for out in results], even, min(team, even))
            if even < images:
                share_out(find, [x[even:] for x in inputs], [out[even:] for out in results])
            return results
    return execute(find([x.shape for x in inputs], team), inputs, outs)


def _placed(
    wires: Sequence[Wires], plans: Sequence[Plan], calls: ctypes.Array[Call], given: dict[int, int],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[list[_Link], int]:  # fmt: skip
    """Give every tensor its place; return what is to be filled in, and the size of the arena."""
    arena = Arena()
    links: list[_Link] = []
    inputs = len(shapes) - len(wires)
    last = {number: index for index, each in enumerate(wires) for number in (each.reads, each.adds)}
    places: dict[int, int] = {}

    def link(index: int, name: str, image: str, number: int, more: int = 0) -> None:
        """Note where a tensor lies, and how far apart its images do."""
        if number in given:
            base = _GIVEN + 2 * given[number]
            links.extend((_Link(_word(index, name), base, 4 * more), _Link(_word(index, image), base + 1)))
        else:
            links.append(_Link(_word(index, name), _ARENA, 4 * (places[number] + more)))
            setattr(calls[index], image, math.prod(shapes[number][1:]) if shapes[number][0] > 1 else 0)

    for index, ((reads, adds, into), each, call) in enumerate(zip(wires, plans, calls, strict=True)):
        result = inputs + index
        links.append(_Link(_word(index, "address"), _CALLS, index * ctypes.sizeof(Call)))
        target, first = (result, 0) if into is None else into
        if target not in given:
            places[target] = arena.take(math.prod(shapes[target]))
        link(index, "out", "out_image", target, first * call.out_channel + call.out_top * call.out_row)
        if adds is not None:
            link(index, "residual", "residual_image", adds, each.adds_from)
        aside = []
        if each.schedule.copied:
            aside.append(arena.take(each.schedule.copied))
            link(index, "picture", "picture_image", reads, each.reads_from)
            links.extend(_Link(_word(index, name), _ARENA, 4 * aside[-1]) for name in ("planes", "x"))
        elif call.kind != LAYER:
            link(index, "picture", "picture_image", reads, each.reads_from)
        else:
            link(index, "x", "x_image", reads)
        if each.schedule.tiles:
            aside.append(arena.take(each.schedule.tiles))
            links.append(_Link(_word(index, "tiles"), _ARENA, 4 * aside[-1]))
        done = [number for number in places if last.get(number, number - inputs) <= index]
        for place in (*aside, *(places.pop(number) for number in done)):
            arena.give(place)
    return links, arena.size


def _word(index: int, name: str) -> int:
    """Which word of the calls a field of one of them is."""
    offset: int = getattr(Call, name).offset
    return index * _WORDS + offset // 8


def _by_image(tensor: Tensor) -> Tensor:
    """The tensor itself if each of its images is contiguous, else a contiguous copy."""
    tensor = tensor.resolve_neg()  # a negative view's memory holds the opposite
    return tensor if tensor.is_contiguous() or tensor[0].is_contiguous() else tensor.contiguous()


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise InputError(f"the kernel computes fp32 on the CPU; the {name} is {tensor.dtype} on {tensor.device}")


def _check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    _check("out", out)
    if out.shape != shape or (out.numel() and not out[0].is_contiguous()):
        found = f"{list(out.shape)} with strides {out.stride()}"
        raise InputError(f"out must be {list(shape)} with contiguous images, not {found}")
