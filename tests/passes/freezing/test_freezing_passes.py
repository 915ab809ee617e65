"""Freezing as a list of passes: what each asks for and finds wrong with its result, and lists without some of them."""

import operator
from dataclasses import replace

import pytest
import torch
from torch import nn

import sgfx
from passes.errors import PassError
from passes.freezing.arranging.chaining import Chaining
from passes.freezing.arranging.placing import Placing
from passes.freezing.arranging.stepping import steps_of
from passes.freezing.asking import ASKED, ORIGINAL, Asked
from passes.freezing.choosing.choosing import LAYERS, Choosing
from passes.freezing.choosing.decisions import machine
from passes.freezing.choosing.forms import FORM, Forming
from passes.freezing.choosing.recipe import Recipe
from passes.freezing.choosing.stopwatch import Stopwatch
from passes.freezing.comparing.checking import DOUBT, Comparison
from passes.freezing.parts import PARTS, Part, RemoveUnread, Rewriting, quiet_copy
from passes.freezing.recording import FROZEN
from passes.freezing.rewrites.rewrite import SHAPES
from passes.infra.compilation import Compilation
from passes.infra.manager import run_passes
from passes.infra.progress import silent
from passes.kernel import PackedConv2d
from passes.kernel.packed_chain import PackedChain
from passes.layers.grouped import Grouped
from passes.options.settings import SETTINGS, Settings
from passes.pipeline import REWRITES, REWRITING, freezing
from passes.tracing.regions import REGIONS
from tests.sgfx.test_freeze import IMAGES, Block, error, needs_kernel, trained


@pytest.fixture
def small():
    return sgfx.compile(trained(Block()), groups=3, ratio=0.5)


def started(model, strategy=None):
    asked = Asked(strategy, None, False, machine())
    facts = {SETTINGS: Settings(example_inputs=(IMAGES,)), ORIGINAL: model, ASKED: asked}
    return Compilation(quiet_copy(model), facts)


def arranged(model, passes):
    """The graph of a model after some passes that arrange, of which the last is asked to look again."""
    compilation = run_passes(REWRITING, started(model))
    (part,) = compilation[PARTS]
    inner = Compilation(part.graph, {SHAPES: part.inputs})
    return run_passes([Choosing("kernel", {}, Stopwatch()), *passes], inner)


def test_the_lists_in_full(small):
    compilation = run_passes(freezing(silent), started(small))
    frozen = compilation[FROZEN]
    assert error(frozen, small, IMAGES) < 1e-5
    assert list(frozen.decisions.layers) == list(compilation[FORM].layers)
    for gone in (REGIONS, PARTS):  # the graphs that they hold have been rewritten
        assert gone not in compilation


@needs_kernel
@pytest.mark.parametrize(("arranging", "chains"), [((), 0), ((Placing(),), 0), ((Chaining(),), 1)])
def test_what_arranges_can_be_left_out(small, arranging, chains):
    compilation = run_passes((*REWRITING, Forming(arranging), Comparison(REWRITES)), started(small, "kernel"))
    form = compilation[FORM].model
    assert compilation[DOUBT] == ""
    assert error(form, small, IMAGES) < 1e-5
    assert sum(isinstance(module, PackedChain) for module in form.modules()) == chains
    assert any(type(module) is PackedConv2d for module in form.modules())


def test_filters_that_nobody_reads_may_stay(small):
    compilation = run_passes((*REWRITING[1:], Forming(()), Comparison(REWRITES)), started(small, "library"))
    assert error(compilation[FORM].model, small, IMAGES) < 1e-5


@pytest.mark.parametrize(
    ("passes", "missing"),
    [
        ([Rewriting(REWRITES)], "'rewriting' requires regions"),
        ([RemoveUnread(), Forming(())], "'forming' requires parts"),
        ([Comparison(REWRITES)], "'comparison' requires form"),
    ],
)
def test_what_is_missing_is_named(small, passes, missing):
    with pytest.raises(PassError, match=missing):
        run_passes(passes, started(small))


def test_what_arranges_comes_after_the_choice(small):
    compilation = run_passes(REWRITING, started(small))
    (part,) = compilation[PARTS]
    with pytest.raises(PassError, match=r"pass 'placing' requires layers \(ran before it: nothing\)"):
        run_passes([Placing()], Compilation(part.graph, {SHAPES: part.inputs}))


def test_a_layer_that_nothing_was_chosen_for_is_found(small):
    compilation = run_passes(REWRITING, started(small))
    graph = compilation[PARTS][0].graph
    left = next(module for module in graph.modules() if isinstance(module, Recipe))
    found = Choosing(None, {}, Stopwatch()).check(Compilation(graph))
    assert found == f"nothing was chosen for layer {left.path!r}"


def test_parts_within_parts_are_found(small):
    graph = torch.fx.symbolic_trace(torch.nn.ReLU())
    parts = tuple(Part(path, graph, (), {}) for path in ("a", "a.b"))
    assert Rewriting(()).check(Compilation(small, {PARTS: parts})) == "part 'a.b' lies in another one"
    assert Rewriting(()).check(Compilation(small, {PARTS: parts[1:]})) is None


@needs_kernel
def test_margins_that_do_not_fit_are_found(small):
    compilation = arranged(small, [Placing()])
    graph = compilation.model
    assert Placing().check(compilation) is None
    packed = steps_of(graph)
    node = next(node for node in packed if any(user in packed for user in node.users))
    form = packed[node].form
    writes = replace(form.placement.writes, right=form.placement.writes.right + 1)
    packed[node].form = replace(form, placement=replace(form.placement, writes=writes))
    assert f"reads {node.name} with other margins than it is written with" in Placing().check(compilation)


@needs_kernel
def test_layers_that_are_not_chained_are_found(small):
    compilation = arranged(small, [Placing()])
    assert "is not in one call with what follows it" in Chaining().check(compilation)
    assert LAYERS in compilation
    run_passes([Chaining()], compilation)
    assert Chaining().check(compilation) is None
    assert SHAPES not in compilation


def test_a_recipe_in_the_whole_is_found(small):
    compilation = run_passes((*REWRITING, Forming(())), started(small, "library"))
    form = compilation[FORM]
    layer = next(module for module in small.modules() if isinstance(module, Grouped))
    form.model.add_module("left", Recipe(layer, "conv1"))
    assert Forming(()).check(compilation) == "layer 'conv1' can't be run"


@needs_kernel
def test_the_results_of_a_chain_are_taken_in_their_order():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(6)])
            self.last = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")  # which the library computes

        def forward(self, x):
            found = []
            for conv in self.convs:
                x = conv(x)
                found.append(x)
            return [self.last(each) for each in found]

    frozen = sgfx.freeze(Several().eval(), IMAGES, strategy="kernel")
    taken = [node.args[1] for node in frozen.graph.nodes if node.target is operator.getitem]
    assert taken == [0, 1, 2, 3, 4, 5]
