"""A frozen form that computes something else than the eval form is not handed out; where the fault is has a name."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import passes.freezing.choosing.packing
import sgfx
from passes.elimination.elimination import Elimination
from passes.errors import InputError
from passes.freezing.choosing.recipe import Recipe
from tests.sgfx.test_freeze import IMAGES, Block, error, needs_kernel, trained
from tests.sgfx.test_freeze_unusual import Wrapper

FOLD = Recipe.fold


@pytest.fixture
def forget_scale(monkeypatch):
    """Forget the scale of the norm behind a layer."""

    def of(path):
        def fold(recipe, norm):
            FOLD(recipe, norm)
            if recipe.path == path:
                recipe.scale = torch.ones_like(recipe.scale)

        monkeypatch.setattr(Recipe, "fold", fold)

    return of


@pytest.mark.parametrize("layer", ["stem", "conv2", "down"])
def test_a_fault_in_fusing_is_named(forget_scale, layer):
    forget_scale(layer)
    with pytest.raises(
        InputError, match=rf"than Block in eval mode: output differs by .*; '{layer}' is the first layer"
    ):
        sgfx.freeze(trained(Block()), IMAGES, strategy="library")


@needs_kernel
@pytest.mark.parametrize("layer", ["conv1", "head"])
def test_a_fault_in_the_kernel_is_named(monkeypatch, layer):
    model, pack = trained(Block()), passes.freezing.choosing.packing.pack_layer

    def packed(module, **options):
        made = pack(module, **options)
        if module.weight.shape == model.get_submodule(layer).weight.shape:
            made.bias += 1
        return made

    monkeypatch.setattr("passes.freezing.choosing.packing.pack_layer", packed)
    with pytest.raises(InputError, match=f"'{layer}' is the first layer that differs"):
        sgfx.freeze(model, IMAGES, strategy="kernel")


def test_a_fault_in_elimination_is_named(monkeypatch):
    def wrong(self, compilation, run=Elimination.run):
        found = run(self, compilation)
        compilation.model.conv2.weight.data.mul_(2)
        return found

    monkeypatch.setattr(Elimination, "run", wrong)
    small = sgfx.compile(trained(Block()), groups=3, ratio=0.1)
    with pytest.raises(InputError, match="'conv2' is the first layer that differs"):
        sgfx.freeze(small, IMAGES, strategy="library")


class Sneaky(Block):
    """Its graph is that of another network."""

    def forward(self, x):
        return super().forward(x if isinstance(x, fx.Proxy) else 2 * x)


def test_a_graph_that_is_not_the_models_is_found_out():
    with pytest.raises(InputError, match=r"else than Sneaky in eval mode.*'stem' is the first layer that differs"):
        sgfx.freeze(trained(Sneaky()), IMAGES, strategy="library")


def test_a_fault_in_one_of_several_parts_is_named(forget_scale):
    forget_scale("backbone.conv1")
    with pytest.raises(InputError, match=r"else than Wrapper .*'backbone\.conv1' is the first layer that differs"):
        sgfx.freeze(trained(Wrapper()), IMAGES, strategy="library")


def test_code_that_reaches_into_a_part_is_found_out():
    class Reaching(Wrapper):
        def forward(self, images):
            return super().forward(images) + self.backbone.stem(images).mean()

    with pytest.raises(InputError, match=r"else than Reaching in eval mode: it can't be run .*no attribute 'stem'"):
        sgfx.freeze(trained(Reaching()), IMAGES, strategy="library")


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_examples_that_show_nothing_are_not_trusted(forget_scale, number):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)))
    model[0].weight.data -= model[0].weight.data.mean(1, keepdim=True)  # a constant picture gives zeros
    forget_scale("0")
    with pytest.raises(InputError, match="'0' is the first layer that differs"):
        sgfx.freeze(model, torch.full((2, 3, 6, 6), number), strategy="library")


drawn = iter(range(1000))


def unforeseeable(x):
    return x + next(drawn)


fx.wrap("unforeseeable")


def test_models_that_compute_at_random():
    class Dropping(Block):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, True))

    class Random(Block):
        def forward(self, x):
            return super().forward(unforeseeable(x))

    sgfx.freeze(trained(Dropping()), IMAGES, strategy="library")  # it draws the same numbers
    with pytest.raises(InputError, match="Random gives something else each time in eval mode"):
        sgfx.freeze(trained(Random()), IMAGES, strategy="library")


class Signs(nn.Module):
    """The signs of what is zero but for rounding, beside what is well conditioned."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.last(torch.tanh(y)), torch.sign(y[:, :4] - y[:, 4:])


def test_what_turns_on_rounding_is_handed_out_with_a_note(forget_scale):
    model = trained(Signs())
    norm = model.norm
    with torch.no_grad():
        for tensor in (model.conv.weight, model.conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[4:] = tensor[:4]
        norm.running_var[4:] = 9 * (norm.running_var[4:] + norm.eps) - norm.eps
        norm.weight[4:] *= 3  # the same, rounded otherwise
    frozen = sgfx.freeze(model, IMAGES, strategy="library")
    assert "every layer by itself agrees: the outputs turn on rounding" in frozen.decisions.note
    forget_scale("conv")
    with pytest.raises(InputError, match="'conv' is the first layer that differs"):
        sgfx.freeze(model, IMAGES, strategy="library")


def test_not_a_number_equals_not_a_number():
    class Log(Block):
        def forward(self, x):
            return torch.log(super().forward(x))

    model = trained(Log())
    with torch.no_grad():
        assert 0 < model(IMAGES).isnan().sum() < 12
    sgfx.freeze(model, IMAGES, strategy="library")


def test_a_comparison_costs_one_call_of_the_model(monkeypatch):
    calls, run = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x: calls.append(isinstance(x, fx.Proxy)) or run(self, x))
    model = trained(Block())
    frozen = sgfx.freeze(model, IMAGES, strategy="library")
    assert calls.count(False) == 1
    assert error(frozen, model, IMAGES) < 1e-5


def test_outputs_that_cannot_be_compared_are_refused():
    class Empty(Block):
        def forward(self, x):
            super().forward(x)
            return []

    with pytest.raises(InputError, match="output is a Answer, which can't be taken apart"):
        sgfx.freeze(trained(Opaque()), IMAGES, strategy="library")
    with pytest.raises(InputError, match="nothing to compare a frozen form by"):
        sgfx.freeze(trained(Empty()), IMAGES, strategy="library")


class Answer:
    def __init__(self, scores):
        self.scores = scores


class Opaque(Wrapper):
    def forward(self, images):
        return Answer(super().forward(images))
