"""Masked and grouped layers against an oracle: the library's layer with a weight that is masked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.layers.grouped import GROUPED
from passes.layers.masked import MASKED
from passes.layers.plan import LayerPlan


def random_plan(layer, groups, share, generator, empty_group=False):
    """A plan with random groups and connections; its first group reads nothing if so asked."""
    filters, inputs = layer.weight.shape[:2]
    labels = torch.cat([torch.arange(groups), torch.randint(groups, (filters - groups,), generator=generator)])
    keep = torch.rand(groups, inputs, generator=generator) > share
    keep[-1, 0] = True
    if empty_group:
        keep[0] = False
    return LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=share)


def oracle(layer, plan):
    """The dense layer with the pruned weights set to zero by hand, as a leaf of its own."""
    twin = type(layer)(**arguments(layer)).to(layer.weight.dtype)
    mask = torch.stack([plan.keep[label] for label in plan.labels.tolist()])
    while mask.dim() < layer.weight.dim():
        mask = mask.unsqueeze(-1)
    twin.weight.data = torch.where(mask, layer.weight.data, torch.zeros_like(layer.weight))
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.clone()
    return twin, mask.expand_as(layer.weight)


def arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def relative(actual, expected):
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check_all_forms(layer, plan, x, bound):
    """Outputs, and gradients of kept weights, bias and input, of the masked layer and both grouped forms."""
    twin, mask = oracle(layer, plan)
    masked = MASKED[type(layer)].from_dense(type(layer)(**arguments(layer)).to(x.dtype))
    masked.load_state_dict(layer.state_dict() | {"mask": plan.mask()})
    grouped = GROUPED[type(layer)].from_dense(layer, plan)
    results = {}
    for name, module, form in (
        ("oracle", twin, None),
        ("masked", masked, None),
        ("dense", grouped, "dense"),
        ("blocks", grouped, "blocks"),
    ):
        if form is not None:
            module.form = form
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        output = module(inputs)
        (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
        gradient = module.weight.grad
        if form is None:
            # Dense gradients, brought into the order of the packed rows: by group, filter, input.
            order = torch.argsort(plan.labels, stable=True)
            gradient = gradient[order][mask[order]].view(-1)
        bias = None if module.bias is None else module.bias.grad
        results[name] = output.detach(), inputs.grad, gradient.reshape(-1), bias
    for name in ("masked", "dense", "blocks"):
        for actual, expected in zip(results[name], results["oracle"], strict=True):
            if expected is not None:
                assert actual.shape == expected.shape
                assert relative(actual, expected) < bound, name


KERNELS = [1, 2, 3, 5, 7]
PADDINGS = ["zeros", "reflect", "replicate", "circular"]


@st.composite
def convolutions(draw):
    """A convolution of one to three dimensions, and an input that is large enough for it."""
    dims = draw(st.integers(1, 3))
    kernel = [draw(st.sampled_from(KERNELS[: 5 if dims < 3 else 3])) for _ in range(dims)]
    dilation = draw(st.integers(1, 2))
    stride = draw(st.integers(1, 3))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 2)))
    mode = draw(st.sampled_from(PADDINGS))
    stride = 1 if padding == "same" else stride
    size = [dilation * (k - 1) + draw(st.integers(1, 4)) + 3 for k in kernel]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        draw(st.integers(1, 6)),
        draw(st.integers(4, 9)),
        tuple(kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        bias=draw(st.booleans()),
    ).double()
    return layer, size


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of the dense layer too
@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(2, 4), st.floats(0, 0.9), st.booleans(), st.integers(0, 2**16))
def test_convolutions_of_every_geometry_agree_with_the_oracle(case, groups, share, empty_group, seed):
    layer, size = case
    generator = torch.Generator().manual_seed(seed)
    plan = random_plan(layer, groups, share, generator, empty_group)
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64, generator=generator)
    check_all_forms(layer, plan, x, 1e-10)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_agree_with_the_oracle(shape, bias):
    layer = nn.Linear(6, 9, bias=bias).double()
    plan = random_plan(layer, 3, 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(shape, dtype=torch.float64)
    check_all_forms(layer, plan, x, 1e-10)


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (5, 8, 8), (0, 5, 8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_unbatched_empty_and_channels_last_inputs(shape, channels_last):
    layer = nn.Conv2d(5, 8, 3, padding=1).double()
    plan = random_plan(layer, 3, 0.5, torch.Generator().manual_seed(0), empty_group=True)
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    check_all_forms(layer, plan, x, 1e-10)


def test_single_precision_agrees_to_its_own_bound():
    layer = nn.Conv2d(32, 48, 3, padding=1)
    plan = random_plan(layer, 6, 0.8, torch.Generator().manual_seed(0))
    check_all_forms(layer, plan, torch.randn(2, 32, 12, 12), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_half_precision_keeps_its_type(dtype, form):
    layer = nn.Conv2d(8, 8, 3).to(dtype)
    plan = random_plan(layer, 2, 0.5, torch.Generator().manual_seed(0))
    grouped = GROUPED[nn.Conv2d].from_dense(layer, plan)
    grouped.form = form
    x = torch.randn(1, 8, 6, 6, dtype=dtype)
    expected = oracle(layer, plan)[0].float()(x.float())
    assert grouped.weight.dtype == grouped(x).dtype == dtype
    assert relative(grouped(x).float(), expected) < 0.02


@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_autocast_gives_its_own_type_in_both_forms(form):
    layer = nn.Conv2d(8, 8, 3)
    plan = random_plan(layer, 2, 0.5, torch.Generator().manual_seed(0), empty_group=True)
    grouped = GROUPED[nn.Conv2d].from_dense(layer, plan)
    grouped.form = form
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped(torch.randn(1, 8, 6, 6)).dtype == torch.bfloat16


def test_a_group_without_inputs_yields_its_bias_and_unread_inputs_are_not_gathered():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    keep = torch.tensor([[False, False, False, False], [True, False, False, True]])
    plan = LayerPlan.of(layer, labels=torch.tensor([1, 0, 1, 0]), keep=keep, requested_ratio=0.75)
    grouped = GROUPED[nn.Conv2d].from_dense(layer, plan)
    assert grouped.inputs.tolist() == [0, 3]
    assert grouped.filters.tolist() == [1, 3, 0, 2]
    assert grouped.block_sizes.tolist() == [[2, 0], [2, 2]]
    for form in ("dense", "blocks"):
        grouped.form = form
        y = grouped(torch.randn(1, 4, 5, 5))
        assert torch.equal(y[0, 1], layer.bias[1].expand(5, 5))
        assert torch.equal(y[0, 3], layer.bias[3].expand(5, 5))


def test_the_packed_weight_has_a_row_per_connection_group_after_group():
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.arange(9.0).view(3, 3)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    plan = LayerPlan.of(layer, labels=torch.tensor([0, 1, 0]), keep=keep, requested_ratio=0.4)
    grouped = GROUPED[nn.Linear].from_dense(layer, plan)
    assert grouped.weight.tolist() == [[0.0], [2.0], [6.0], [8.0], [4.0]]
    assert sum(p.numel() for p in grouped.parameters()) == plan.connections == 5
    assert list(grouped.state_dict()) == ["weight", "_extra_state"]
    assert list(grouped.buffers()) == []


def test_five_steps_of_sgd_give_masked_and_grouped_layers_the_same_weights():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3).double()
    plan = random_plan(layer, 3, 0.6, torch.Generator().manual_seed(1))
    grouped = GROUPED[nn.Conv2d].from_dense(layer, plan)
    grouped.bias = nn.Parameter(layer.bias.detach().clone())
    masked = MASKED[nn.Conv2d].from_dense(layer)
    masked.update(plan)
    x = torch.randn(4, 6, 7, 7, dtype=torch.float64)
    for module in (masked, grouped):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert relative(grouped.dense_weight(), masked.masked_weight()) < 1e-10
    assert relative(grouped.bias, masked.bias) < 1e-10
