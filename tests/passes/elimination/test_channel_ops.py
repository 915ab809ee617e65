"""Every operation of the tables does with channels what its labels say, called in many ways on tensors of every rank.

Two claims of the labels are tried by running the operation. A channel that nothing holds reaches only what bears its
label; and taken out of what the operation reads, it takes out just that of what the operation gives.
"""

import itertools

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sgfx
from passes.elimination import operations as channel_ops
from passes.elimination.analysis import Channels
from passes.elimination.labelling import _Labelling
from passes.elimination.labels import along
from passes.tracing.trace import Region
from tests.passes.elimination.test_elimination import IMAGES, Chain, check_equal, compiled
from tests.tools.operation_calls import MODULES, OPERATIONS

SIZES = (3, 4, 5, 6, 7)


class Values(fx.Interpreter):
    def run_node(self, n):
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


class Labelled(_Labelling):
    """A graph with labels, with channels along `dim` of the input, and nobody behind the output."""

    def __init__(self, graph, dim):
        self.dim = dim
        super().__init__(Channels(), Region("", {}), graph, {})

    def _visit(self, node):
        if node.op == "placeholder":
            shape = node.meta["val"].shape
            return along(torch.arange(1, shape[self.dim] + 1), shape, self.dim)
        return None if node.op == "output" else super()._visit(node)

    def held(self):
        return {int(slot) for slots, _ in self.channels._held for slot in slots}


def check(operation, x, dim):
    """Try the claims for channels along one dimension; return how many channels were free."""
    graph = fx.symbolic_trace(Called(operation, x.shape))
    run = graph.forward
    expected = Values(graph).run(x)
    if not isinstance(expected, Tensor):
        return 0
    labelled = Labelled(graph, dim)
    labelled.run()
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    labels = labelled.labels[output]
    assert labels.shape == expected.shape
    free = set(range(1, x.shape[dim] + 1)) - labelled.held()
    assert not free & {slot for tie in labelled.channels._ties.edges for slot in tie}
    for slot in {*sorted(free)[:1], *sorted(free)[-1:]}:
        other = x.clone()
        other.select(dim, slot - 1).mul_(-3).add_(0.3)
        changed = ~torch.isclose(run(other), expected, rtol=1e-12, atol=1e-14, equal_nan=True)
        assert not bool((changed & (labels != slot)).any()), "a channel reaches what does not bear its label"
        rest = [k for k in range(x.shape[dim]) if k != slot - 1]
        less = run(x.index_select(dim, torch.tensor(rest)))
        torch.testing.assert_close(less.flatten(), expected[labels != slot], rtol=1e-12, atol=1e-14, equal_nan=True)
    return len(free)


class Called(nn.Module):
    """An operation, given the shape too where it asks for it."""

    def __init__(self, operation, shape):
        super().__init__()
        code = getattr(operation, "__code__", None)
        asks = code is not None and code.co_varnames[:2] == ("x", "s")
        self.operation, self.more = operation, (tuple(shape),) if asks else ()

    def forward(self, x):
        return self.operation(x, *self.more)


def trials():
    for rank in range(2, 6):
        x = torch.rand(SIZES[:rank], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
        for dim in range(rank):
            yield x, dim


def tried(operations):
    free = 0
    for operation, (x, dim) in itertools.product(operations, list(trials())):
        try:
            Called(operation, x.shape)(x.clone())
        except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError, AssertionError):
            continue
        free += check(operation, x, dim)
    return free


HOLDING = {"expand_as", "roll", "where"}  # whatever they do


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_do_with_channels_what_their_labels_say(name):
    assert tried(OPERATIONS[name]) > 0 or name in HOLDING


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(MODULES))
def test_modules_do_with_channels_what_their_labels_say(kind):
    assert tried([module.eval() for module in MODULES[kind]]) > 0


POOLS = {
    "max pool": lambda self, x: F.max_pool3d(x, 3, 1, 1),
    "module": lambda self, x: self.pool(x),
    "average pool": lambda self, x: F.avg_pool3d(x, (3, 1, 1), 1, (1, 0, 0)),
    "adaptive pool": lambda self, x: F.adaptive_max_pool3d(x, (8, 8, 8)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_over_channels_reads_them_all(name):
    model = Chain(POOLS[name])
    model.pool = nn.MaxPool3d(3, 1, 1)
    dense, small = compiled(model)
    assert len(small.a.weight) == 8
    check_equal(dense, small)
    for each in (dense, small):
        expected = each.eval()(IMAGES)
        assert (sgfx.freeze(each, IMAGES, strategy="library")(IMAGES) - expected).abs().max() < 1e-12


def test_every_operation_of_the_tables_is_tried():
    ops = channel_ops
    tables = ops.ELEMENTWISE, ops.LOCAL, ops.REDUCTIONS, ops.ALONG_ONE_DIM, ops.JOINING, ops.RELATIVE, ops.COUNTING
    assert set(OPERATIONS) == set().union(*tables)
    assert set(MODULES) == {*ops.ELEMENTWISE_MODULES, *ops.LOCAL_MODULES}


def test_examples_without_elements_show_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    small = sgfx.compile(model, groups=3, ratio=0.6)
    frozen = sgfx.freeze(small, torch.zeros(0, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert frozen(images[:0]).shape == (0, 8, 8, 8)
    assert (frozen(images) - small(images)).abs().max() < 1e-5
