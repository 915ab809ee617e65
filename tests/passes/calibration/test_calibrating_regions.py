"""The walk of two graphs in step, and what it knows of follows a layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import sgfx
from passes.calibration import sampling
from passes.calibration.calibrating import calibrate_region
from passes.calibration.data import read_examples
from passes.calibration.followers import followers_of
from passes.calibration.paired_walk import Pair, Walk
from passes.calibration.pairing import walkable_regions
from passes.errors import InputError
from passes.layers.channel_cut import works_on_filters
from passes.layers.known.norms import scale_and_shift
from passes.tracing.trace import trace


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


class Difference(nn.Module):
    """A model of two inputs."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(channels, 8, 1), nn.Conv2d(channels, 8, 1)
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(F.relu(self.one(x) - self.other(y)))


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


def test_followers_of_each_layer():
    graph = trace(Residual()).graphs["eval"]
    found = {node.target: followers_of(graph, node) for node in graph.graph.nodes if node.op == "call_module"}
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
    assert not followers_of(graph, conv).clipped


def test_a_tensor_that_a_hook_sees_is_not_bent():
    model = Residual()
    model.bn1.register_forward_hook(lambda *_: None)
    graph = trace(model).graphs["eval"]
    conv1 = next(node for node in graph.graph.nodes if node.target == "conv1")
    assert followers_of(graph, conv1).norm is None


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, partial(nn.BatchNorm2d, affine=False), FrozenBatchNorm2d])
def test_scale_and_shift_are_the_norm(kind):
    norm = made(kind(4))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scale, shift = (each.view(1, 4, 1, 1) for each in scale_and_shift(norm))
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
        monkeypatch.setattr(sampling, "Walk", lambda *args, limit=limit: Walk(*args, limit=limit))
        tight = calibrate_region(*graphs(dense, small), batches)
        assert free.keys() == tight.keys()
        assert all(torch.equal(free[name], tight[name]) for name in free)


class Parts(nn.Module):
    """Two traceable parts with a branch on data between them; the second is called by keyword."""

    def __init__(self, choose: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.second = Difference(8)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            x = -x
        if self.choose:
            best = x.sum((1, 2, 3)).topk(len(x) // 2).indices
            x = x[best]
        return self.second(y=x, x=x.flip(2))


def pairs_of_second(choose: bool) -> tuple[nn.Module, nn.Module, Sequence[Pair]]:
    dense = made(Parts(choose))
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=images(4), seed=1)
    batches = [(x,) for x in images(12).split(4)]
    found = {path: pairs for path, _, _, pairs in walkable_regions(dense, small, batches, ())}
    assert list(found) == ["first", "second"]
    return dense, small, found["second"]


def test_parts_called_by_keyword_are_given_their_arguments_by_position():
    dense, small, pairs = pairs_of_second(choose=False)
    assert len(pairs) == 3
    for (theirs, mine), x in zip(pairs, images(12).split(4), strict=True):
        for given, model in ((theirs, dense), (mine, small)):
            y = model.first(x)
            assert torch.equal(given[0], y.flip(2))
            assert torch.equal(given[1], y)


def test_behind_a_choice_by_value_both_are_given_the_dense_arguments():
    _, _, pairs = pairs_of_second(choose=True)
    assert all(theirs is mine for theirs, mine in pairs)


def test_arguments_beyond_the_limit_are_found_again_by_another_run(monkeypatch):
    monkeypatch.setattr("passes.calibration.pairing.LIMIT", 0)
    _, _, again = pairs_of_second(choose=False)
    monkeypatch.undo()
    _, _, kept = pairs_of_second(choose=False)
    for theirs, mine in zip(again, kept, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


def test_a_choice_within_a_graph_is_seen():
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.before = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(self.conv(x)).flatten(2)
            return self.head(x.sort(2, descending=True).values[..., 0])

    dense = made(Best())
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    walk = Walk(*graphs(dense, small), [((x,), (x,)) for x in images().split(4)])
    chosen = {str(stop.target): [held.chosen for held in walk.at(stop)] for stop in walk.stops()}
    assert chosen == {"before": [False, False], "head": [True, True]}
    stop = list(walk.stops())[1]
    sample = sampling.sample_at(walk, stop, sampling.followers_at(walk, stop))
    torch.testing.assert_close(dense.head(sample.inputs), sample.wanted, rtol=0, atol=1e-12)  # of one network


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "own"),
    [
        (nn.Linear(4, 4), nn.BatchNorm1d(4), (5, 4), True),
        (nn.Linear(4, 4), nn.BatchNorm1d(4), (5, 4, 4), False),
        (nn.Linear(4, 4), nn.BatchNorm2d(4), (5, 4, 4, 4), False),
        (nn.Linear(4, 4), FrozenBatchNorm2d(4), (1, 4), False),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), (5, 4, 4, 4), True),
        (nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4), (5, 4, 4, 4), True),
        (nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), (5, 4, 4), True),
        (nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), (4, 4), False),
    ],
)
def test_a_norm_is_the_layers_own_where_it_scales_its_filters(layer, norm, shape, own):
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            tensor.copy_(torch.arange(1, 5) + ("mean" in name)) if tensor.dim() else None
    y = layer(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert works_on_filters(norm, layer, y.dim()) == own
    if own:
        axis = 1 if y.dim() > 2 and not isinstance(layer, nn.Linear) else -1
        scale, shift = scale_and_shift(norm.eval())
        scaled = (y.movedim(axis, -1).double() * scale + shift).movedim(-1, axis)
        torch.testing.assert_close(scaled.float(), norm.eval()(y), rtol=1e-5, atol=1e-5)


def test_other_operations_are_refused():
    dense, other = made(Residual()), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(InputError, match="finds other operations"):
        Walk(trace(dense).graphs["eval"], trace(other).graphs["eval"], [])


def test_examples_are_cut_and_labels_left_out():
    x = torch.arange(70.0).view(70, 1)
    model = nn.Linear(1, 1)
    assert [len(batch) for (batch,) in read_examples(x, "data", model)] == [32, 32, 6]
    labelled = [(x[:3], torch.zeros(3)), [x[3:5], {"boxes": 1}], x[5:6]]
    assert torch.equal(torch.cat([batch for (batch,) in read_examples(labelled, "data", model)]), x[:6])
    ((several,),) = read_examples([([x[:1], x[1:3]], "targets")], "data", model)
    assert [tensor.tolist() for tensor in several] == [x[:1].tolist(), x[1:3].tolist()]


def test_a_model_of_two_inputs_takes_them_from_the_front_of_a_batch():
    x, y = torch.arange(70.0).view(70, 1), -torch.arange(70.0).view(70, 1)
    for batch in ((x, y), [x, y, torch.zeros(70)], ((x, y), torch.zeros(70))):
        found = read_examples([batch], "data", Difference())
        assert [len(given) for given in found] == [2, 2, 2]
        assert torch.equal(torch.cat([given[0] for given in found]), x)
        assert torch.equal(torch.cat([given[1] for given in found]), y)
    ((first, second),) = read_examples([(x[:3], [y[:1], y[1:4]])], "data", Difference())
    assert torch.equal(first, x[:3])
    assert len(second) == 2
    for short in (x, [x], [(x,)], [((x,), y)]):
        with pytest.raises(InputError, match="requires 2 inputs, but batch 1 of data holds 1"):
            read_examples(short, "data", Difference())


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
        read_examples(data, "data", nn.Identity())


def test_a_shuffling_loader_leaves_the_global_random_state():
    images = torch.utils.data.TensorDataset(torch.arange(40.0).view(40, 1))
    before = torch.get_rng_state()
    read_examples(torch.utils.data.DataLoader(images, batch_size=8, shuffle=True), "data", nn.Identity())
    assert torch.equal(torch.get_rng_state(), before)
