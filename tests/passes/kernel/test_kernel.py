"""The kernel against `F.conv2d` in fp64, within the rounding that fp32 sums of that length must have, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from passes import kernel
from passes.errors import InputError
from passes.kernel import Block, Form, Geometry, Margins, Placement, Target, Tiling
from passes.kernel.form import plan
from passes.kernel.layout.packing import Structure, pack
from passes.kernel.program import Step, Wires, execute, program, share_out

HOST = kernel.host()
if isinstance(HOST, str):
    pytest.skip(HOST, allow_module_level=True)
# The same source for every width: on any machine, LLVM splits vectors that are too wide for it.
TARGETS = [
    Target(16, 32, HOST.cpu, HOST.features),
    Target(8, 16, HOST.cpu, HOST.features),
    Target(4, 32, HOST.cpu, HOST.features),
]
ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
GATES = ("sigmoid", "hardsigmoid")
ROUNDING = 2.0**-24
SEEDS = st.integers(0, 2**31)


@dataclass
class Layer:
    """A layer in both forms: blocks for the kernel, a dense weight for torch."""

    geometry: Geometry
    blocks: list[Block]
    dense: Tensor
    bias: Tensor


def random_layer(seed: int, geometry: Geometry, most_groups: int) -> Layer:
    """Filters in random groups, some of one filter and some without inputs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, most_groups, (geometry.out_channels,), generator=generator)
    weight = torch.randn(geometry.out_channels, geometry.in_channels, *geometry.kernel_size, generator=generator)
    dense, blocks = torch.zeros_like(weight), []
    for group in labels.unique():
        filters = (labels == group).nonzero()[:, 0]
        share = torch.rand(1, generator=generator) - 0.1
        inputs = (torch.rand(geometry.in_channels, generator=generator) < share).nonzero()[:, 0]
        blocks.append(Block(filters, inputs, weight[filters][:, inputs]))
        dense[filters[:, None], inputs] = weight[filters][:, inputs]
    return Layer(geometry, blocks, dense, torch.randn(geometry.out_channels, generator=generator))


def reference(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in fp64, and the sum of the absolute values of its terms."""
    top, bottom, left, right = layer.geometry.padding

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x.double(), (left, right, top, bottom))
        return F.conv2d(padded, weight.double(), bias.double(), layer.geometry.stride, 0, layer.geometry.dilation)

    return convolve(x, layer.dense, layer.bias), convolve(x.abs(), layer.dense.abs(), layer.bias.abs())


def run(layer: Layer, form: Form, x: Tensor, residual: Tensor | None = None, threads: int = 1) -> Tensor:
    tables = pack(layer.blocks, layer.bias, layer.geometry, 8)
    inputs = (x,) if residual is None else (x, residual)
    wires, shapes = Wires(adds=None if residual is None else 1), [each.shape for each in inputs]
    together = execute(program([Step(form, tables)], [wires], [0], shapes, threads), inputs)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        shared_out = share_out(partial(program, [Step(form, tables)], [wires], [0]), inputs)[0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.nan_to_num(together), torch.nan_to_num(shared_out))
    return shared_out


def check(layer: Layer, form: Form, x: Tensor, add: bool, threads: int = 1) -> None:
    """Compare with fp64: each sum may differ by as much as the rounding of its terms, in any order."""
    placement = form.placement
    expected, terms = reference(layer, x)
    residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)) if add else None
    if residual is not None:
        expected, terms = expected + residual.double(), terms + residual.abs().double()
    expected = ACTIVATIONS[form.activation](expected)
    given_x = placement.reads.apply(x)
    given_residual = None if residual is None else placement.adds.apply(residual)
    before = given_x.clone()
    whole = run(layer, form, given_x, given_residual, threads)
    result = placement.writes.strip(whole)
    assert torch.equal(given_x, before)
    assert torch.equal(placement.writes.apply(result), whole), "the margins are not zero"
    assert result.shape == expected.shape
    length = layer.dense[0].numel() + 8
    own = 4 * ROUNDING if form.activation in GATES else 1e-30  # about 1, however small the terms are
    assert torch.all((result.double() - expected).abs() <= 1.1 * length * ROUNDING * terms + own)


margins = st.builds(Margins, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
small = st.integers(0, 2)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
geometries = st.builds(
    Geometry,
    st.integers(1, 40),
    st.integers(1, 12),
    kernel_size=st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 3, 5])),
    stride=pairs,
    padding=st.tuples(small, small, small, small),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
same = st.builds(  # 1×1 and 3×3 that keep the size: the layers most networks are made of
    lambda out, inn, k: Geometry(out, inn, (k, k), padding=(k // 2,) * 4),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([1, 3]),
)
sizes = st.sampled_from([1, 2, 3, 5, 7, 13, 14, 28, 30])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=SEEDS,
    geometry=geometries | same,
    groups=st.integers(1, 40),
    images=st.integers(0, 3),
    height=sizes,
    width=sizes,
    placement=st.builds(Placement, margins, margins, margins) | st.just(Placement(*[Margins(2, 1, 1)] * 3)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    add=st.booleans(),
    tiling=st.builds(Tiling, st.integers(2, 28), st.integers(1, 6)),
    threads=st.integers(1, 3),
    target=st.sampled_from(TARGETS),
)
def test_any_layer_on_any_picture(
    seed: int, geometry: Geometry, groups: int, images: int, height: int, width: int, placement: Placement,
    activation: str | None, add: bool, tiling: Tiling, threads: int, target: Target,
) -> None:  # fmt: skip
    layer = random_layer(seed, geometry, groups)
    form = Form(geometry, activation, placement, tiling, target)
    x = torch.randn(images, geometry.in_channels, height, width, generator=torch.Generator().manual_seed(seed))
    if min(geometry.output_size(height, width)) < 1:
        with pytest.raises(InputError, match="smaller than the kernel"):
            run(layer, form, placement.reads.apply(x), None, threads)
        return
    check(layer, form, x, add, threads)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.lanes} lanes")
@pytest.mark.parametrize("filters", range(1, 9))
def test_every_micro_kernel(filters: int, target: Target) -> None:
    # A block of `filters` filters, and pictures of 1 … 14 vectors and a rest: runs of every length.
    layer = random_layer(filters, Geometry(filters, 5), most_groups=1)
    for vectors in range(1, 15):
        form = Form(layer.geometry, "silu", tiling=Tiling(14, 1), target=target)
        check(layer, form, torch.randn(1, 5, 1, vectors * target.lanes + vectors % 3), add=bool(vectors % 2))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_linear_layers_are_pictures_of_one_pixel(batch: int) -> None:
    layer = random_layer(batch, Geometry(50, 30), most_groups=8)
    check(layer, Form(layer.geometry), torch.randn(batch, 30, 1, 1), add=True, threads=2)


def test_a_stride_can_step_over_a_picture_of_one_pixel() -> None:
    layer = random_layer(1, Geometry(4, 3, stride=(3, 3), padding=(1, 1, 1, 1)), most_groups=2)
    check(layer, Form(layer.geometry), torch.randn(2, 3, 1, 1), add=False)


def test_an_input_larger_than_the_caches() -> None:
    layer = random_layer(1, Geometry(3, 40, (3, 3), padding=(1, 1, 1, 1)), most_groups=2)
    form = Form(layer.geometry, placement=Placement(reads=layer.geometry.margins()))
    assert plan(form, (1, 40, 259, 257), False, Structure(1), 1).template.prefetch
    check(layer, form, torch.randn(1, 40, 256, 256), add=False)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_over_the_whole_range(activation: str | None) -> None:
    # A layer that copies its input, so that the activation alone is seen; the exponential must not overflow.
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-1e-3, 1e-3, 95)]).view(1, 1, 64, 64)
    layer = Layer(
        Geometry(1, 1),
        [Block(torch.tensor([0]), torch.tensor([0]), torch.ones(1, 1, 1, 1))],
        torch.ones(1, 1, 1, 1),
        torch.zeros(1),
    )
    result = run(layer, Form(layer.geometry, activation), x)
    expected = ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_not_a_number_stays_one(activation: str | None) -> None:
    layer = Layer(
        Geometry(1, 1),
        [Block(torch.tensor([0]), torch.tensor([0]), torch.ones(1, 1, 1, 1))],
        torch.ones(1, 1, 1, 1),
        torch.zeros(1),
    )
    assert run(layer, Form(layer.geometry, activation), torch.full((1, 1, 8, 8), torch.nan)).isnan().all()


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9), st.sampled_from([1, 3, 7, 20]), st.sampled_from([1, 2]), st.integers(1, 3))
def test_inputs_kept_between_their_ends(seed: int, channels: int, size: int, step: int, images: int) -> None:
    layer = random_layer(seed, Geometry(12, channels, stride=(step, step)), most_groups=3)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, size, size, generator=generator)
    ends = torch.randn(channels, 2, generator=generator).sort(1).values
    ends[torch.rand(channels, 2, generator=generator) < 0.3] = torch.inf
    ends[:, 0] = torch.where(ends[:, 0].isinf(), -torch.inf, ends[:, 0])
    tables = pack(layer.blocks, layer.bias, layer.geometry, 8, ends)
    (result,) = execute(program([Step(Form(layer.geometry), tables)], [Wires()], [0], [x.shape], 1), [x])
    kept = x.double().clamp(ends[:, 0].view(-1, 1, 1).double(), ends[:, 1].view(-1, 1, 1).double())
    expected, terms = reference(layer, kept)
    assert torch.all((result.double() - expected).abs() <= 1.1 * (channels + 8) * ROUNDING * terms + 1e-30)


def test_inputs_in_any_memory_format() -> None:
    layer = random_layer(1, Geometry(9, 6, (3, 3), padding=(1, 1, 1, 1)), most_groups=3)
    x = torch.randn(2, 6, 9, 11)
    expected = run(layer, Form(layer.geometry), x)
    unaligned = torch.randn(2 * 6 * 9 * 11 + 1)[1:].view(2, 6, 9, 11).copy_(x)
    for same in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), unaligned):
        assert torch.equal(run(layer, Form(layer.geometry), same), expected)


def test_a_plan_reads_in_place_where_the_margins_hold_the_padding() -> None:
    geometry = Geometry(4, 4, (3, 3), padding=(1, 1, 1, 1))
    placed = Form(geometry, placement=Placement(reads=geometry.margins(), writes=geometry.margins()))
    plane = geometry.margins().apply(torch.zeros(1, 4, 14, 14))
    schedule = plan(placed, tuple(plane.shape), False, Structure(1), 1).schedule
    assert (schedule.copied, schedule.tiles) == (0, 0)
    schedule = plan(Form(geometry), (1, 4, 14, 14), False, Structure(1), 1).schedule
    assert schedule.copied > 0
    assert schedule.tiles > 0


def test_refusals() -> None:
    layer = random_layer(1, Geometry(4, 3), most_groups=2)
    form = Form(layer.geometry)
    with pytest.raises(InputError, match=r"reads \[N, 3, H, W\], not \[N, 5, 4, 4\]"):
        run(layer, form, torch.zeros(1, 5, 4, 4))
    with pytest.raises(InputError, match=r"fp32 on the CPU; the input is torch.float64"):
        run(layer, form, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(InputError, match=r"residual must be \[1, 4, 4, 4\], not \[1, 4, 4, 5\]"):
        run(layer, form, torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 5))
    with pytest.raises(InputError, match=r"ends must be \[3, 2\], not \[2, 3\]"):
        pack(layer.blocks, None, layer.geometry, 8, torch.zeros(2, 3))
    padded = Geometry(4, 3, padding=(1, 1, 1, 1))
    with pytest.raises(InputError, match="only be kept between ends where nothing is padded"):
        pack(layer.blocks, None, padded, 8, torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"'gelu' is not one the kernel can fuse"):
        run(layer, Form(layer.geometry, "gelu"), torch.zeros(1, 3, 4, 4))
