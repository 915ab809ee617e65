"""The structure of masked and grouped layers is no number: what moves, converts or copies a model leaves it alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import sgfx
from passes.layers.structured import Structured

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def dense():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(48, 6)
    return nn.Sequential(*layers).eval()


def compiled(**options):
    return sgfx.compile(dense(), **({"groups": 3, "ratio": 0.5} | options))


def masked(steps=1):
    pruner = sgfx.Pruner(dense(), groups=3, ratio=0.6, step=0.2)
    for step in pruner:
        if step.index == steps:
            break
    return pruner.model


def in_form(form):
    """A model with structured layers, in one of their forms."""
    if form == "masked":
        return masked()
    made = compiled()
    for layer in structured(made):
        layer.form = form
    return made


@pytest.fixture(params=["dense", "blocks", "masked"])
def model(request):
    return in_form(request.param)


def structured(model):
    return [module for module in model.modules() if isinstance(module, Structured)]


def tables(model):
    return [getattr(layer, name) for layer in structured(model) for name in layer.TABLES]


def assert_same_tables(model, other):
    assert len(tables(model)) == len(tables(other)) > 0
    for mine, theirs in zip(tables(model), tables(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_neither_parameters_nor_buffers_hold_the_structure(model):
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in dense().named_buffers()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense().named_parameters()]
    for layer in structured(model):
        assert list(layer.state_dict()) == ["weight", "bias", "_extra_state"]


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half().float(),
        lambda m: m.double().float(),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.type(torch.float64).float(),
        lambda m: m.share_memory(),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m._apply(torch.zeros_like),
        lambda m: m.cpu(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m.to("meta")).to_empty(device="cpu"),
    ],
)
def test_what_converts_moves_and_copies_leaves_it_right(model, convert):
    before, plans = copy.deepcopy(model), sgfx.plans(model)
    after = convert(model)
    assert_same_tables(after, before)
    assert sgfx.plans(after) == plans
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(IMAGES), before(IMAGES))


@pytest.mark.parametrize("setting", ["overwrite", "swap"])
def test_torchs_other_ways_to_convert_leave_it_right(model, setting, monkeypatch):
    name = {"overwrite": "overwrite", "swap": "swap"}[setting] + "_module_params_on_conversion"
    before = copy.deepcopy(model)
    getattr(torch.__future__, f"set_{name}")(True)
    try:
        after = model.double().float()
    finally:
        getattr(torch.__future__, f"set_{name}")(False)
    assert_same_tables(after, before)
    assert torch.equal(after(IMAGES), before(IMAGES))


def test_a_model_on_the_meta_device_computes_shapes_and_takes_values_by_assignment(model):
    expected, state = model(IMAGES), model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    assert empty(IMAGES.to("meta")).shape == expected.shape
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(IMAGES), expected)


def test_replicas_use_tables_of_the_device_of_their_weights(model):
    """As `DataParallel` makes them: their weights are plain attributes, of another device."""
    for layer in structured(model):
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():
            setattr(replica, name, parameter.detach().to("meta"))
        x = torch.empty(2, layer.in_channels, 5, 5) if hasattr(layer, "in_channels") else torch.empty(2, 48)
        assert replica(x.to("meta")).is_meta
        assert replica(x.to("meta")).shape == layer(x).shape
        assert all(getattr(layer, name).device.type == "cpu" for name in layer.TABLES)


def test_functional_calls_and_ensembles(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    values, buffers = stack_module_state([model, other])
    assert all(value.is_floating_point() or name.endswith("tracked") for name, value in buffers.items())

    def call(values, buffers):
        return functional_call(model, (values, buffers), IMAGES)

    both = vmap(call)(values, buffers)
    for actual, each in zip(both, (model, other), strict=True):
        torch.testing.assert_close(actual, each(IMAGES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call(dict(each.named_parameters()), dict(each.named_buffers())), each(IMAGES))


def test_torch_compile_makes_one_graph_and_new_masks_need_no_new_one():
    torch._dynamo.reset()
    pruner = sgfx.Pruner(dense(), groups=3, ratio=0.6, step=0.2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    fast = torch.compile(pruner.model, backend=backend, fullgraph=True)
    outputs = []
    for _ in pruner:
        outputs.append(fast(IMAGES))
        assert torch.equal(outputs[-1], pruner.model(IMAGES))
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[-1])


def test_torch_export_takes_the_tables_for_constants(model):
    program = torch.export.export(model, (IMAGES,))
    assert torch.equal(program.module()(IMAGES), model(IMAGES))
    again = io.BytesIO()
    torch.export.save(program, again)
    again.seek(0)
    assert torch.equal(torch.export.load(again).module()(IMAGES), model(IMAGES))


def test_torch_fx_traces_through_grouped_layers():
    model = compiled()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(IMAGES), model(IMAGES))
