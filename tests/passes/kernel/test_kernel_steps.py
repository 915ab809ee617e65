"""Steps that are no layers, and layers that read pictures as they are, against torch in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from passes import kernel
from passes.errors import InputError
from passes.kernel import Block, Form, Geometry, Margins, Placement, Target
from passes.kernel.form import PlaneForm
from passes.kernel.layout.packing import Tables, pack
from passes.kernel.program import Step, Wires, execute, program, share_out
from passes.kernel.runtime.call_record import LAYER, PIXEL, WINDOW

HOST = kernel.host()
if isinstance(HOST, str):
    pytest.skip(HOST, allow_module_level=True)
TARGETS = [Target(lanes, registers, HOST.cpu, HOST.features) for lanes, registers in ((16, 32), (8, 16), (4, 32))]
ACTIVATIONS = {
    None: lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu,
    "sigmoid": F.sigmoid, "hardsigmoid": F.hardsigmoid,
}  # fmt: skip
margins = st.builds(Margins, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
placements = st.builds(Placement, margins, margins, margins) | st.just(Placement())
sizes = st.sampled_from([1, 2, 3, 5, 7, 14, 15, 16, 17, 28, 35])
grid = partial(settings, max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(form: Form | PlaneForm, x: Tensor, second: Tensor | None, threads: int, tables: Tables | None = None) -> Tensor:
    """One step, on its own; together and shared out must be alike, and what is beside the picture zero."""
    placement = form.placement
    inputs = [placement.reads.apply(x)] + ([] if second is None else [placement.adds.apply(second)])
    steps, wires = [Step(form, tables)], [Wires(0, None if second is None else 1)]
    together = execute(program(steps, wires, [0], [each.shape for each in inputs], threads), inputs)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        shared_out = share_out(partial(program, steps, wires, [0]), inputs)[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, shared_out, rtol=0, atol=0, equal_nan=True)
    result = placement.writes.strip(together)
    torch.testing.assert_close(placement.writes.apply(result), together, rtol=0, atol=0, equal_nan=True)  # zeros beside
    return result


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@grid()
@given(
    seed=st.integers(0, 2**31), does=st.sampled_from(["nothing", "sum", "product", "gate"]),
    activation=st.sampled_from(list(ACTIVATIONS)), images=st.integers(0, 3), channels=st.integers(1, 40),
    height=sizes, width=sizes, placement=placements, threads=st.integers(1, 3), target=st.sampled_from(TARGETS),
)  # fmt: skip
def test_sums_products_gates_and_activations(
    seed: int, does: str, activation: str | None, images: int, channels: int, height: int, width: int,
    placement: Placement, threads: int, target: Target,
) -> None:  # fmt: skip
    x = random(seed, images, channels, height, width)
    size = (1, 1) if does == "gate" else (height, width)
    second = None if does == "nothing" else random(seed + 1, images, channels, *size)
    combined = x.double()
    if second is not None:
        combined = combined + second.double() if does == "sum" else combined * second.double()
    result = run(PlaneForm(does, activation, placement, target=target), x, second, threads)
    torch.testing.assert_close(result.double(), ACTIVATIONS[activation](combined), rtol=2e-6, atol=2e-6)


@grid()
@given(
    seed=st.integers(0, 2**31), images=st.integers(0, 3), channels=st.integers(1, 40), height=sizes, width=sizes,
    placement=placements, threads=st.integers(1, 3), target=st.sampled_from(TARGETS),
)  # fmt: skip
def test_means(
    seed: int, images: int, channels: int, height: int, width: int, placement: Placement, threads: int, target: Target
) -> None:
    x = random(seed, images, channels, height, width)
    result = run(PlaneForm("mean", None, placement, target=target), x, None, threads)
    terms = x.double().abs().mean((2, 3), keepdim=True)
    differs = (result.double() - x.double().mean((2, 3), keepdim=True)).abs()
    assert torch.all(differs <= 2.0**-24 * (height * width + 2) * terms)


windows = st.builds(
    lambda kernel, stride, dilation, padding: Geometry(0, 0, kernel, stride, padding, dilation),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.integers(0, 3)] * 4),
)


@grid()
@given(
    seed=st.integers(0, 2**31), window=windows, activation=st.sampled_from(list(ACTIVATIONS)), images=st.integers(0, 3),
    channels=st.integers(1, 11), height=sizes, width=sizes, placement=placements, threads=st.integers(1, 3),
    target=st.sampled_from(TARGETS),
)  # fmt: skip
def test_depthwise_layers_with_a_stride(
    seed: int, window: Geometry, activation: str | None, images: int, channels: int, height: int, width: int,
    placement: Placement, threads: int, target: Target,
) -> None:  # fmt: skip
    if min(window.output_size(height, width)) < 1:
        return
    geometry = Geometry(channels, channels, window.kernel_size, window.stride, window.padding, window.dilation)
    weight, bias = random(seed, channels, 1, *geometry.kernel_size), random(seed + 1, channels)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))  # filters in any order
    reads = torch.randperm(channels, generator=torch.Generator().manual_seed(seed + 1))
    blocks = [Block(order[i : i + 1], reads[i : i + 1], weight[i : i + 1]) for i in range(channels)]
    tables, form = pack(blocks, bias, geometry, 8), Form(geometry, activation, placement, target=target)
    x = random(seed + 2, images, channels, height, width)
    plane = placement.reads.apply(x)
    kind = Step(form, tables).plan(tuple(plane.shape), False, 1).template.kind
    assert kind == (LAYER if window.stride == (1, 1) else WINDOW) or (images < 16 and kind == PIXEL)
    result = run(form, x, None, threads, tables)
    placed = torch.empty_like(weight)
    placed[order] = weight
    read = torch.empty_like(reads)
    read[order] = reads
    top, bottom, left, right = geometry.padding
    padded = F.pad(x.double()[:, read], (left, right, top, bottom))
    expected = F.conv2d(padded, placed.double(), bias.double(), geometry.stride, 0, geometry.dilation, channels)
    torch.testing.assert_close(result.double(), ACTIVATIONS[activation](expected), rtol=1e-5, atol=1e-5)


@grid()
@given(
    seed=st.integers(0, 2**31), window=windows, images=st.integers(0, 3), channels=st.integers(1, 11), height=sizes,
    width=sizes, placement=placements, threads=st.integers(1, 3), target=st.sampled_from(TARGETS),
)  # fmt: skip
def test_the_largest_of_each_window(
    seed: int, window: Geometry, images: int, channels: int, height: int, width: int, placement: Placement,
    threads: int, target: Target,
) -> None:  # fmt: skip
    if min(window.output_size(height, width)) < 1:
        return
    x = random(seed, images, channels, height, width)
    top, bottom, left, right = window.padding
    padded = F.pad(x, (left, right, top, bottom), value=-torch.inf)
    expected = F.max_pool2d(padded, window.kernel_size, window.stride, 0, window.dilation) if images else x[:0]
    result = run(PlaneForm("largest", None, placement, window, target), x, None, threads)
    assert torch.equal(result, expected) or not images


def test_the_largest_of_what_is_not_a_number() -> None:
    x = random(0, 1, 3, 9, 9)
    x[:, 1, 4, 4] = torch.nan
    result = run(PlaneForm("largest", window=Geometry(0, 0, (3, 3), (2, 2), (1, 1, 1, 1))), x, None, 1)
    torch.testing.assert_close(result, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)


@grid()
@given(
    seed=st.integers(0, 2**31), images=st.sampled_from([1, 2, 3, 15, 16, 40]), inputs=st.integers(1, 70),
    filters=st.integers(1, 40), activation=st.sampled_from(list(ACTIVATIONS)), add=st.booleans(), placement=placements,
    threads=st.integers(1, 3), target=st.sampled_from(TARGETS),
)  # fmt: skip
def test_layers_on_pictures_of_one_pixel(
    seed: int, images: int, inputs: int, filters: int, activation: str | None, add: bool, placement: Placement,
    threads: int, target: Target,
) -> None:  # fmt: skip
    weight, bias = random(seed, filters, inputs, 1, 1), random(seed + 1, filters)
    half = filters // 2  # a group that reads every other input, and one that reads all
    weight[:half, 1::2] = 0
    rows = torch.randperm(filters, generator=torch.Generator().manual_seed(seed))
    blocks = [Block(rows[:half], torch.arange(0, inputs, 2), weight[:half, ::2])] if half else []
    blocks.append(Block(rows[half:], torch.arange(inputs), weight[half:]))
    dense = torch.empty_like(weight)
    dense[rows] = weight
    geometry, x = Geometry(filters, inputs), random(seed + 2, images, inputs, 1, 1)
    second = random(seed + 3, images, filters, 1, 1) if add else None
    tables, form = pack(blocks, bias, geometry, 8), Form(geometry, activation, placement, target=target)
    result = run(form, x, second, threads, tables)
    expected = F.conv2d(x.double(), dense.double(), bias.double()) + (0 if second is None else second.double())
    torch.testing.assert_close(result.double(), ACTIVATIONS[activation](expected), rtol=2e-5, atol=2e-5)


def test_a_small_batch_of_pixels_gives_the_numbers_of_a_large_one() -> None:
    tables = pack([Block(torch.arange(50), torch.arange(300), random(1, 50, 300, 1, 1))], None, Geometry(50, 300), 8)
    form, x = Form(Geometry(50, 300), "silu"), random(2, 64, 300, 1, 1)
    step = Step(form, tables)
    assert step.plan((1, 300, 1, 1), False, 1).template.kind == PIXEL
    assert step.plan((64, 300, 1, 1), False, 1).template.kind == LAYER
    alone = torch.cat([run(form, image, None, 1, tables) for image in x.split(1)])
    assert torch.equal(run(form, x, None, 2, tables), alone)


def test_refusals() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match=r"does 'sum' can't be called with one input of \[1, 3, 4, 4\]"):
        run(PlaneForm("sum"), x, None, 1)
    with pytest.raises(InputError, match=r"residual must be \[1, 3, 1, 1\], not \[1, 3, 4, 4\]"):
        run(PlaneForm("gate"), x, x, 1)
    with pytest.raises(InputError, match="smaller than the window"):
        run(PlaneForm("largest", window=Geometry(0, 0, (5, 5))), x, None, 1)
