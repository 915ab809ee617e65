"""Functions that hold parts of a model run the parts of its copy."""

import functools

import pytest
import torch
from torch import nn

import sgfx
from passes.errors import InputError
from passes.models.copying import copy_model, unhooked_copy
from passes.models.rebinding import held_by, rebound


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))


def replaced(way):
    """A net whose body's forward was replaced by a closure over the layers of the original."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Body(), nn.Conv2d(8, 8, 1)).double()
    body = net[1]
    old, conv, layers, weight = body.forward, body.conv, {"all": [body.conv, body.norm]}, body.conv.weight
    body.forward = {
        "closure": lambda x: conv(x).relu(),
        "method": lambda x: old(x).relu(),
        "tensor": lambda x: nn.functional.conv2d(x, weight),
        "list": lambda x: layers["all"][1](layers["all"][0](x)),
        "default": lambda x, conv=conv: conv(x).relu(),
        "partial": functools.partial(lambda module, x: module.conv(x) * 2, body),
        "nested": (lambda inner: lambda x: inner(x) + 1)(lambda x: conv(x) * 2),
    }[way]
    return net


WAYS = ["closure", "method", "tensor", "list", "default", "partial", "nested"]
IMAGES = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied", [copy_model, unhooked_copy])
def test_a_copy_runs_its_own_layers(copied, way):
    net = replaced(way).eval()
    twin = copied(net)
    with torch.no_grad():
        expected = net(IMAGES)
        for parameter in net.parameters():
            parameter.zero_()
        assert torch.equal(twin(IMAGES), expected)
        net.load_state_dict(twin.state_dict())
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(IMAGES).any()
        assert torch.equal(net(IMAGES), expected)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_and_frozen_they_compute_the_same(way):
    net = replaced(way)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = sgfx.compile(net, groups=2, ratio=0.5, example_inputs=IMAGES)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not sgfx.plans(small)["1.conv"].grouped or way in ("partial", "method")
    assert sgfx.verify(net, small, IMAGES).max_error < 1e-12
    with torch.no_grad():
        expected = small.eval()(IMAGES)
        assert (sgfx.freeze(small, IMAGES, strategy="library")(IMAGES) - expected).abs().max() < 1e-12


def test_the_copy_that_is_traced_does_not_write_to_the_original():
    net = replaced("list")
    before = net[1].norm.running_mean.clone()
    unhooked_copy(net).train()(IMAGES)
    assert torch.equal(net[1].norm.running_mean, before)


def test_a_global_that_is_a_part_of_the_model_is_refused():
    net = replaced("closure")
    exec("def forward(x): return LAYER(x)", space := {"LAYER": net[1].conv})
    net[1].forward = space["forward"]
    with pytest.raises(
        InputError, match=r"module '1' \(Body\) can't be copied: a function on it, 'forward', reads the "
    ):
        sgfx.compile(net, groups=2, ratio=0.5)


def test_functions_that_hold_each_other_and_what_holds_nothing():
    module, twin = nn.ReLU(), nn.ReLU()

    def even(n):
        return module if n == 0 else odd(n - 1)

    def odd(n):
        return even(n - 1)

    assert rebound(even, {id(module): twin})(4) is twin
    assert rebound(even, {}) is even
    assert module in list(held_by([even]))


def test_hooks_of_a_copy_run_its_own_layers():
    net = replaced("closure")
    conv = net[2]
    net[1].register_forward_hook(lambda module, args, output: conv(output))
    assert next(iter(copy_model(net)[1]._forward_hooks.values())).__closure__[0].cell_contents is not conv
