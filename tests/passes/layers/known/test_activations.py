"""One list of activations: however one is written it is found, and it computes what it is called by."""

import pytest
import torch
from torch import fx, nn

from passes.kernel.codegen.activations import ACTIVATIONS as OF_THE_KERNEL
from passes.layers.known.activations import ACTIVATIONS, BY_CALL, BY_MODULE, activate
from passes.tracing.operations import activation_of

X = torch.linspace(-9, 9, 1001, dtype=torch.float64)


def called(call, x):
    return getattr(x, call)() if isinstance(call, str) else call(x)


def test_the_kernel_knows_the_same_ones():
    assert set(OF_THE_KERNEL) == {None, *ACTIVATIONS}


def test_none_is_two_things():
    assert len(BY_CALL) == sum(len(set(each.calls)) for each in ACTIVATIONS.values())
    assert len(BY_MODULE) == len(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_way_to_write_one_computes_the_same(name):
    known = ACTIVATIONS[name]
    expected = known.module()(X)
    fresh = X.clone()
    made = activate(name, fresh)
    torch.testing.assert_close(made, expected)
    assert made.data_ptr() == fresh.data_ptr()
    for call in known.calls:
        torch.testing.assert_close(called(call, X.clone()), expected)
    assert not torch.equal(expected, X)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_way_to_write_one_is_found_in_graphs(name):
    for write in (ACTIVATIONS[name].module(), *ACTIVATIONS[name].calls):
        graph, root = fx.Graph(), {"act": write} if isinstance(write, nn.Module) else {}
        x = graph.placeholder("x")
        if isinstance(write, nn.Module):
            y = graph.call_module("act", (x,))
        else:
            y = graph.call_method(write, (x,)) if isinstance(write, str) else graph.call_function(write, (x,))
        graph.output(y)
        module = fx.GraphModule(root, graph)
        assert [activation_of(module, node) for node in graph.nodes] == [None, name, None]


def test_no_activation_is_the_identity():
    assert activate(None, X) is X
