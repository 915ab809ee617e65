"""What a rule leaves alone has a reason in a user's words: a case for each."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.freezing.choosing.decisions import Decisions


class Net(nn.Module):
    """What a function makes of some layers."""

    def __init__(self, does):
        super().__init__()
        self.does = does
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.up = nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1)
        self.line, self.tokens = nn.Linear(6, 6), nn.BatchNorm1d(4)
        for norm in (self.norm, self.tokens):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
            nn.init.normal_(norm.bias)

    def forward(self, *inputs):
        return self.does(self, *inputs)


def changed_on_the_way(n, x):
    y = n.conv(x)
    x += 1
    return y + n.up(x)


def shared(n, x):
    y = n.conv(x)
    return F.relu(y) + n.up(y).neg()


def changed_before_the_reader(n, x):
    x = x.neg()
    y = F.relu(n.norm(x))
    x += 1
    return n.other(y) + n.up(x).neg()


def added_in_place(n, x):
    y = x.neg()
    z = y[:]
    y += n.conv(x)
    return y * z


CASES = {  # what is computed: what was not fused, and why
    "kind": (lambda n, x: n.up(x), {"up": "it is a ConvTranspose2d, which is run as it is"}),
    "norm, no layer": (
        lambda n, x: n.norm(x).neg(),
        {"norm": "no layer stands before it, and no ReLU follows it"},
    ),
    "norm, other dimension": (
        lambda n, x: n.tokens(n.line(x[:, :, 0])),
        {"tokens": "it works on another dimension than the filters of layer 'line', and no ReLU follows it"},
    ),
    "norm, read twice": (
        lambda n, x: n.norm(y := n.conv(x)) * y,
        {"norm": "the output of layer 'conv' is read twice, and no ReLU follows it"},
    ),
    "norm, read three times": (
        lambda n, x: n.norm(y := n.conv(x)) * y * y.neg(),
        {"norm": "the output of layer 'conv' is read 3 times, and no ReLU follows it"},
    ),
    "sum, number": (lambda n, x: n.conv(x) + 2, {"add": "it adds a number, and no tensor"}),
    "sum, itself": (lambda n, x: (y := n.conv(x)) + y, {"add": "it adds a tensor to itself"}),
    "sum, shapes": (
        lambda n, x: n.conv(x) + x[:, :, :1],
        {"add": "its summands have the shapes [2, 4, 6, 6] and [2, 4, 1, 6]"},
    ),
    "sum, in place": (added_in_place, {"iadd": "it changes a tensor in place that is read elsewhere"}),
    "sum, no layer": (lambda n, x: x.neg() + x, {"add": "neither summand is the output of a layer"}),
    "sum, read twice": (
        lambda n, x: (y := n.conv(x)) + n.other(y),
        {},  # the other one adds it
    ),
    "sum, both read twice": (
        lambda n, x: (y := n.conv(x)) + (z := n.other(x)) + y * z,
        {
            "add": "the output of layer 'conv' is read twice, and the output of layer 'other' is read twice",
            "add_1": "neither summand is the output of a layer",
        },
    ),
    "sum, of a sum": (
        lambda n, x: n.conv(x) + x.neg() + x.exp(),
        {"add_1": "layer 'conv' adds another tensor already"},
    ),
    "sum, input changed": (
        changed_on_the_way,
        {
            "up": "it is a ConvTranspose2d, which is run as it is",
            "iadd": "it adds a number, and no tensor",
            "add": "what layer 'conv' reads is changed in place before the sum",
        },
    ),
    "activation, no layer": (
        lambda n, x: F.relu(x.neg()),
        {"relu": "neither a layer nor a norm stands before it"},
    ),
    "activation, another one": (
        lambda n, x: F.hardswish(F.relu(n.conv(x))),
        {"hardswish": "layer 'conv' has another activation already"},
    ),
    "activation, read twice": (
        shared,
        {
            "up": "it is a ConvTranspose2d, which is run as it is",
            "add": "neither summand is the output of a layer",
            "relu": "the output of layer 'conv' is read twice",
        },
    ),
    "activation, of a norm that is read twice": (
        lambda n, x: F.relu(y := n.norm(x)) * y,
        {
            "norm": "no layer stands before it, and no ReLU follows it",
            "relu": "the output of the norm before it is read twice",
        },
    ),
    "threshold": (lambda n, x: n.other(F.relu(n.norm(x))), {}),
    "threshold, shift": (
        lambda n, x: n.other(F.relu(n.norm(x))),
        {"norm": "no layer stands before it, and it shifts by more than 100"},
    ),
    "threshold, half precision": (
        lambda n, x: n.other(F.relu(n.norm(x))),
        {"norm": "no layer stands before it, and it computes in half precision"},
    ),
    "threshold, no layer reads it": (
        lambda n, x: F.relu(n.norm(x)).neg(),
        {"norm": "no layer stands before it, and what reads it is no layer"},
    ),
    "threshold, channels": (
        lambda n, x: n.line(F.relu(n.norm(x))),
        {"norm": "no layer stands before it, and the filters of layer 'line' behind it do not read all channels"},
    ),
    "threshold, padding": (
        lambda n, x: n.conv(F.relu(n.norm(x))),
        {"norm": "no layer stands before it, and layer 'conv' behind it pads with zeros"},
    ),
    "threshold, input changed": (
        changed_before_the_reader,
        {
            "up": "it is a ConvTranspose2d, which is run as it is",
            "norm": "no layer stands before it, and what it reads is changed in place before layer 'other'",
            "iadd": "it adds a number, and no tensor",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_fused_says_why(case):
    torch.manual_seed(0)
    does, expected = CASES[case]
    model, x = Net(does).eval(), torch.randn(2, 4, 6, 6)
    if "shift" in case:
        nn.init.constant_(model.norm.bias, 200.0)
    if "half" in case:
        model, x = model.bfloat16(), x.bfloat16()
    assert dict(sgfx.freeze(model, x, strategy="library").decisions.unfused) == expected


def test_what_was_changed_about_a_layer_is_said():
    model = Net(lambda n, x: F.relu(n.conv(x))).eval()
    model.conv.forward = model.conv.forward
    unfused = sgfx.freeze(model, torch.randn(2, 4, 6, 6), strategy="library").decisions.unfused
    assert unfused["conv"] == "its forward was replaced on the instance"


def test_summands_that_follow_different_inputs():
    model, x = Net(lambda n, x, y: n.conv(x) + y).eval(), torch.randn(2, 4, 6, 6)
    unfused = sgfx.freeze(model, (x, x.neg()), strategy="library").decisions.unfused
    assert unfused == {"add": "its summands follow different inputs of the model, which may differ in their batch"}


def test_places_have_the_names_that_a_user_knows():
    """The path of a module, each call of one, and of an operation the module in whose forward it stands."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net(lambda n, x: n.norm(F.relu(n.norm(x.neg()).neg())).neg())

        def forward(self, x):
            return self.inner(x)

    lone = "no layer stands before it, and no ReLU follows it"
    unfused = sgfx.freeze(Outer().eval(), torch.randn(2, 4, 6, 6), strategy="library").decisions.unfused
    relu = "neither a layer nor a norm stands before it"
    assert unfused == {"inner.norm": lone, "inner.norm#2": lone, "relu in inner": relu}


def test_reasons_are_shown_and_kept():
    torch.manual_seed(0)
    model, x = Net(lambda n, x: n.norm(y := n.conv(x)) * y).eval(), torch.randn(2, 4, 6, 6)
    frozen = sgfx.freeze(model, x)
    line = "not fused: norm: the output of layer 'conv' is read twice, and no ReLU follows it"
    assert line in str(frozen.decisions).splitlines()
    assert line in str(sgfx.report(model, frozen, x)).splitlines()
    made = Decisions.from_dict(json.loads(json.dumps(frozen.decisions.to_dict())))
    assert made == frozen.decisions
    assert sgfx.freeze(model, x, decisions=made).decisions.unfused == made.unfused


def test_many_reasons_are_shown_in_few_lines():
    places = {f"a{number}": "it is odd" for number in range(5)} | {f"b{i}": f"it is {i}" for i in range(9)}
    lines = Decisions("here", {}, unfused=places).summary().splitlines()
    assert lines[1] == "not fused: a0, a1, a2 and 2 more: it is odd"
    assert lines[2] == "not fused: b0: it is 0"
    assert lines[8:] == ["not fused: b6: it is 6", "and 2 more reasons, in decisions.unfused"]


def test_decisions_from_before_there_were_reasons_are_read():
    data = Decisions("here", {}, unfused={"add": "it is odd"}).to_dict()
    del data["unfused"]
    assert Decisions.from_dict(data).unfused == {}
