"""Hooks and freezing: taps are left out and never fire, and a model in which a hook changes something is refused."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune

import sgfx
from passes.errors import InputError
from tests.sgfx.test_freeze import IMAGES, Block, error, trained


class Tap:
    """Keeps what it sees, histories and all."""

    def __init__(self):
        self.seen, self.mean = [], torch.zeros(1)

    def __call__(self, module, args, output):
        self.seen.append(output)
        self.mean.add_(1)

    def before(self, module, args, kwargs):
        self.seen.append(args)


def test_taps_are_left_out_and_never_fire():
    model, tap, seen = trained(Block()), Tap(), []
    model.conv1.register_forward_hook(tap)
    model.register_forward_pre_hook(tap.before, with_kwargs=True)
    model.register_forward_hook(lambda *each: seen.append(each), always_call=True)
    model(IMAGES)  # taps hold tensors with histories now
    counts = len(tap.seen), len(seen), float(tap.mean)
    frozen = sgfx.freeze(model, IMAGES, strategy="library")
    frozen(IMAGES)
    assert (len(tap.seen), len(seen), float(tap.mean)) == counts
    assert error(frozen, model, IMAGES) < 1e-5


def flipped(module, args, output):
    return output.flip(1)


def scaled(module, args, output):
    output.mul_(2)


def flipped_before(module, args):
    return args[0].flip(1)


def flipped_keywords(module, args, kwargs):
    return (args[0].flip(1),), kwargs


@pytest.mark.parametrize("path", ["", "conv1"])
@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (nn.Module.register_forward_hook, flipped),
        (nn.Module.register_forward_hook, scaled),
        (nn.Module.register_forward_pre_hook, flipped_before),
        (lambda *each: nn.Module.register_forward_pre_hook(*each, with_kwargs=True), flipped_keywords),
    ],
)
def test_hooks_that_change_something_are_refused(path, register, hook):
    model = trained(Block())
    handle = register(model.get_submodule(path), hook)
    with pytest.raises(InputError, match=rf"a forward (pre-)?hook on '{path}' changes what the model computes: remove"):
        sgfx.freeze(model, IMAGES, strategy="library")
    handle.remove()
    assert error(sgfx.freeze(model, IMAGES, strategy="library"), model, IMAGES) < 1e-5


def test_hooks_that_can_not_be_copied_are_refused():
    model, generator = trained(Block()), (each for each in (1, 2))
    model.register_forward_hook(lambda *_: next(generator) and None)
    with pytest.raises(InputError, match=r"can't be told whether a forward hook on '' changes something.*: remove it"):
        sgfx.freeze(model, IMAGES, strategy="library")
    assert next(generator) == 1


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_are_refused_and_seen_by_elimination(register):
    model = trained(Block())
    small = sgfx.compile(model, groups=3, ratio=0.9)
    handle = register(lambda module, *seen: None)
    try:
        with pytest.raises(InputError, match="one is registered for all modules there are: remove it first"):
            sgfx.freeze(model, IMAGES, strategy="library")
        seen = sgfx.compile(model, groups=3, ratio=0.9, eliminate=True)
        assert [p.shape for p in seen.parameters()] == [p.shape for p in small.parameters()]
    finally:
        handle.remove()
    fewer = sgfx.compile(model, groups=3, ratio=0.9, eliminate=True)
    assert sum(p.numel() for p in fewer.parameters()) < sum(p.numel() for p in small.parameters())


def test_a_norm_whose_weight_a_hook_computes_is_refused():
    model = trained(Block())
    prune.l1_unstructured(next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d)), "weight", 0.5)
    with pytest.raises(InputError, match=r"the weight of layer '.*' is computed by a hook"):
        sgfx.freeze(model, IMAGES)
