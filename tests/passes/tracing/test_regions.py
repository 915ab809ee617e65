"""Models that can't be traced whole: their parts, what runs show, and why the rest is left alone."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.errors import InputError
from passes.options.checks import resolved_leaves
from passes.tracing.regions import find_regions

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block(width=8):
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


class Detector(nn.Module):
    """A wrapper with data-dependent Python around traceable parts and lone layers."""

    def __init__(self):
        super().__init__()
        self.out_channels = 8
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = nn.Sequential(block(), block())
        self.lone = nn.Conv2d(8, 8, 1)
        self.read = nn.Conv2d(8, 8, 1)
        self.rare = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images, threshold=1e9):
        outputs = []
        for image in images:
            x = self.lone(self.body(self.stem(image[None])))
            x = x + F.conv2d(x, self.read.weight) + self.read(x)
            if x.sum() > threshold:
                x = self.rare(x)
            outputs.append(self.head(x.mean((2, 3))))
        return torch.cat(outputs)


def reasons(small):
    return {path: plan.reason for path, plan in sgfx.plans(small).items() if plan.reason}


def masked(model, small):
    for path, plan in sgfx.plans(small).items():
        if plan.grouped:
            weight = model.get_submodule(path).weight
            weight.data *= plan.keep[plan.labels].view(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return model


def test_the_largest_traceable_parts_are_regions():
    regions = find_regions(Detector())
    assert [part.path for part in regions.parts] == []  # its forward mentions .weight, and no run has shown whose
    regions = find_regions(Detector(), (IMAGES,))
    assert [part.path for part in regions.parts] == ["body"]
    assert "can't trace Detector in eval mode: Proxy object cannot be iterated" in regions.untraceable


def test_lone_layers_are_regrouped_where_a_run_shows_that_only_their_own_call_uses_their_parameters():
    torch.manual_seed(0)
    model = Detector()
    small = sgfx.compile(model, ratio=0.5, groups=2, example_inputs=IMAGES)
    found = reasons(small)
    assert type(small) is Detector
    assert small.out_channels == 8
    assert found.keys() == {"stem", "read", "rare"}
    assert found["stem"] == "first convolution"
    assert found["read"] == "its parameters are used outside its own call, by 'conv2d'"
    assert "the example inputs did not reach it" in found["rare"]
    for training in (False, True):
        model.train(training)
        small.train(training)
        expected = masked(model, small)(IMAGES)
        assert torch.allclose(small(IMAGES), expected, atol=1e-6)


class Quiet(nn.Module):
    """Untraceable, without reading anyone's parameters."""

    def __init__(self):
        super().__init__()
        self.body = block()
        self.optional = Optional()
        self.lone = nn.Linear(8, 8)

    def forward(self, images):
        return self.lone(torch.cat([self.optional(self.body(x[None]), 2.0) for x in images]).mean((2, 3)))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=None):
        return self.conv(x) if scale is None else self.conv(x) * scale


def test_parts_with_optional_arguments_need_a_run():
    inputs = (torch.randn(2, 8, 4, 4),)
    assert [part.path for part in find_regions(Quiet()).parts] == ["body"]
    regions = find_regions(Quiet(), inputs)
    assert [part.path for part in regions.parts] == ["body", "optional"]
    assert any(node.name == "mul" for node in regions.parts[1].graphs["eval"].graph.nodes)


def test_without_a_run_lone_layers_stay_and_say_what_to_give():
    found = reasons(sgfx.compile(Quiet(), ratio=0.5, groups=2, overrides={"body.0": {"ratio": 0.5}}))
    assert "give example_inputs, so that a run can show how it is used" in found["lone"]


class NeedsTargets(Quiet):
    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("targets are needed in training")
        return super().forward(images)


def test_a_layer_must_be_seen_in_train_mode_too():
    found = reasons(
        sgfx.compile(
            NeedsTargets(), ratio=0.5, groups=2, example_inputs=torch.randn(2, 8, 4, 4), overrides={"body.0": {}}
        )
    )
    assert "running the example inputs in train mode failed: targets are needed" in found["lone"]


def test_inputs_that_do_not_fit_an_untraceable_model_are_refused_and_nothing_is_changed():
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"example_inputs do not fit Detector: .*channels"):
        sgfx.compile(model, ratio=0.5, example_inputs=torch.zeros(2, 4, 8, 8))
    sgfx.compile(model, ratio=0.5, groups=2, example_inputs=IMAGES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_any_traceable_part_is_refused_with_the_cause():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, images):
            return [self.conv(x) for x in images]

    with pytest.raises(InputError, match=r"nothing to compress: 'conv': outside every part.*can't trace Opaque"):
        sgfx.compile(Opaque(), ratio=0.5)


@pytest.mark.parametrize("named", ["inner", "inn*", nn.Sequential])
def test_leaf_modules_are_not_traced_into(named):
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 8, 1)
    model.inner = block()
    model.last = nn.Conv2d(8, 8, 1)
    found = reasons(sgfx.compile(model, ratio=0.5, groups=2, leaf_modules=named))
    assert "inside the leaf module 'inner': give example_inputs" in found["inner.0"]
    assert "inner.0" not in reasons(sgfx.compile(model, ratio=0.5, groups=2, leaf_modules=named, example_inputs=IMAGES))
    with pytest.raises(InputError, match="leaf_modules entry 'iner' matches no module"):
        sgfx.compile(model, ratio=0.5, leaf_modules="iner")
    with pytest.raises(InputError, match="leaf_modules holds the class Linear, of which the model has no module"):
        sgfx.compile(model, ratio=0.5, leaf_modules=nn.Linear)
    with pytest.raises(TypeError, match="leaf_modules takes names, patterns and modules, not 5"):
        sgfx.compile(model, ratio=0.5, leaf_modules=5)


class Leaf(nn.Sequential):
    """A class to be named."""


@pytest.mark.parametrize(
    "named",
    [
        lambda model: model[1],
        lambda model: [model[1]],
        lambda model: Leaf,
        lambda model: nn.Linear,  # of which the compiled model has none
        lambda model: iter(["1", model[4]]),
        lambda model: (module for module in model if isinstance(module, Leaf)),
    ],
)
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"budget": {"params": 0.6}}, {"ratio": 0.5, "step": 0.25}])
def test_leaf_modules_by_whatever_name_reach_every_part_of_the_work(named, options):
    """Elimination and calibration see them too, and what reached them by name gives the same model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Leaf(nn.ReLU()), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 8))
    model[2].weight.data[:, :2] = 0
    x = torch.randn(64, 3, 2, 2)
    more = {"groups": 2, "eliminate": True, "calibration": x, "example_inputs": x, **options}
    made = sgfx.compile(model, leaf_modules=named(model), **more)
    leaves = resolved_leaves(model, named(model))
    expected = sgfx.compile(model, leaf_modules=leaves, **more)
    assert leaves
    assert torch.equal(made(x), expected(x))


@pytest.mark.parametrize(
    "reading",
    [
        lambda self, x: x * self.read.weight.sum(),
        lambda self, x: x * self.read._parameters["weight"].sum(),
        lambda self, x: x * sum(p.sum() for p in self.read.parameters()),
        lambda self, x: F.conv2d(x, dict(self.named_parameters())["read.weight"]),
    ],
)
def test_parameters_that_a_forward_reads_by_whatever_way_belong_to_others_too(reading):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.read, self.other = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8))

        def forward(self, x):
            return reading(self, self.other(self.read(self.stem(x))))

    found = reasons(sgfx.compile(Model(), ratio=0.5, groups=2))
    assert found.keys() == {"stem", "read"}
    assert found["read"] == "its weight is read by an operation outside its own call"


@pytest.mark.parametrize("network", [block, Detector])
def test_emptied_graphs_hold_no_weights(network):
    """Without a collection of garbage, which takes long in a large process."""
    model, inputs = network(), (IMAGES if network is Detector else torch.randn(2, 8, 8, 8),)
    find_regions(model, inputs)  # the first run imports parts of torch, whose frames keep it
    gc.collect()
    gc.disable()
    try:
        found = find_regions(model, inputs)
        weights = [
            weakref.ref(parameter)
            for region in found.parts
            for graph in region.graphs.values()
            for parameter in graph.parameters()
        ]
        found.empty()
        del found
        assert weights
        assert [each() for each in weights if each() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("network", [block, Detector])
def test_compiling_leaves_nothing_behind_that_only_a_collection_of_garbage_frees(network):
    def alive():
        # By type: asked with isinstance, another test's weak proxy would answer for what it stood for.
        return {id(each) for each in gc.get_objects() if type(each) is nn.Parameter}

    model = network() if network is Detector else nn.Sequential(block(), block())
    inputs = IMAGES if network is Detector else torch.randn(2, 8, 8, 8)
    sgfx.compile(model, groups=2, ratio=0.5, example_inputs=inputs)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        small = sgfx.compile(model, groups=2, ratio=0.5, example_inputs=inputs)
        assert alive() - before == {id(each) for each in small.parameters()}
    finally:
        gc.enable()
