"""The walk of two graphs in step, and what it knows of a layer's surroundings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sgfx
from passes import calibration
from passes.calibration import calibrate_region
from passes.errors import InputError
from passes.examples import read_examples
from passes.surroundings import affine, surroundings
from passes.tandem import Walk
from passes.trace import trace


class Residual(nn.Module):
    """A stem and two blocks with shortcuts, without any norm in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.shortcut = nn.Identity()
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(y + self.shortcut(x))
        x = self.conv3(x) + self.side(x)
        return self.head(x.mean((2, 3)))


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 with random weights, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * 0.4
                tensor.copy_(values.abs() + 0.5 if "var" in name else values)
    return model.double().eval()


def images(count: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graphs(dense: nn.Module, small: nn.Module):
    return trace(dense).graphs["eval"], trace(copy.deepcopy(small)).graphs["eval"]


def test_surroundings_of_each_layer():
    graph = trace(Residual()).graphs["eval"]
    found = {node.target: surroundings(graph, node) for node in graph.graph.nodes if node.op == "call_module"}
    assert [(name, found[name].norm, found[name].clipped) for name in ("stem", "head")] == [
        ("stem", None, False),
        ("head", None, False),
    ]
    assert (found["conv1"].norm.target, found["conv1"].other, found["conv1"].clipped) == ("bn1", None, True)
    assert (found["conv2"].norm.target, found["conv2"].other.target, found["conv2"].clipped) == (
        "bn2",
        "shortcut",
        True,
    )
    assert (found["conv3"].other.target, found["side"].other.target) == ("side", "conv3")


def test_a_module_is_what_its_class_says_and_not_its_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.relu = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x))

    graph = trace(Named()).graphs["eval"]
    conv = next(node for node in graph.graph.nodes if node.target == "conv")
    assert not surroundings(graph, conv).clipped


def test_a_tensor_that_a_hook_sees_is_not_bent():
    model = Residual()
    model.bn1.register_forward_hook(lambda *_: None)
    graph = trace(model).graphs["eval"]
    conv1 = next(node for node in graph.graph.nodes if node.target == "conv1")
    assert surroundings(graph, conv1).norm is None


@pytest.mark.parametrize("track", [True, False])
def test_affine_is_the_norm(track):
    norm = made(nn.BatchNorm2d(4, affine=track))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scale, shift = (each.view(1, 4, 1, 1) for each in affine(norm))
    torch.testing.assert_close(x * scale + shift, norm(x), rtol=0, atol=1e-12)


def test_the_walk_computes_every_node_once_and_keeps_what_is_read_later(monkeypatch):
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    walk = Walk(*graphs(dense, small), [((x,), (x,)) for x in images().split(4)])
    calls = []
    for layer in (walk.graphs[0].bn1, walk.graphs[1].bn1):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    stops = list(walk.stops())
    assert [stop.target for stop in stops] == ["conv1", "conv2", "conv3", "side", "head"]
    for stop in stops:
        for held, x in zip(walk.at(stop), images().split(4), strict=True):
            expected = dense.get_submodule(str(stop.target))
            seen = []
            handle = expected.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
            dense(x)
            handle.remove()
            torch.testing.assert_close(held.value(0, stop, stop), seen[0], rtol=0, atol=1e-12)
    assert len(calls) == 4  # two graphs, two batches


def test_a_memory_limit_changes_nothing_but_the_way(monkeypatch):
    dense = made(Residual())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    batches = [((x,), (x,)) for x in images().split(3)]
    free = calibrate_region(*graphs(dense, small), batches)
    for limit in (0, 20_000):
        monkeypatch.setattr(calibration, "Walk", lambda *args, limit=limit: Walk(*args, limit=limit))
        tight = calibrate_region(*graphs(dense, small), batches)
        assert free.keys() == tight.keys()
        assert all(torch.equal(free[name], tight[name]) for name in free)


def test_other_operations_are_refused():
    dense, other = made(Residual()), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(InputError, match="finds other operations"):
        Walk(trace(dense).graphs["eval"], trace(other).graphs["eval"], [])


def test_examples_are_cut_and_labels_left_out():
    x = torch.arange(70.0).view(70, 1)
    assert [len(batch) for batch in read_examples(x, "data")] == [32, 32, 6]
    labelled = [(x[:3], torch.zeros(3)), [x[3:5], {"boxes": 1}], x[5:6]]
    assert torch.equal(torch.cat(read_examples(labelled, "data")), x[:6])
    (several,) = read_examples([([x[:1], x[1:3]], "targets")], "data")
    assert [tensor.tolist() for tensor in several] == [x[:1].tolist(), x[1:3].tolist()]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 3), InputError, "no examples"),
        ([], InputError, "no examples"),
        (iter([]), InputError, "used up before"),
        (torch.tensor(1.0), InputError, "single number"),
        ([torch.zeros(2, 1), torch.tensor([[0.0], [float("nan")]])], InputError, "batch 2 of data holds NaN"),
        ({"x": torch.zeros(2, 1)}, TypeError, "not dict"),
        (3, TypeError, "not int"),
        ([1, 2], TypeError, "batch 1 is a int"),
    ],
)
def test_examples_that_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        read_examples(data, "data")
