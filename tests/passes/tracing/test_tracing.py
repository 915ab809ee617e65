"""Tracing understands the model without touching it."""

import random

import pytest
import torch
from torch import nn

from passes.errors import InputError
from passes.infra.random_state import preserved_random_state
from passes.tracing.trace import module_calls, trace


class Branching(nn.Module):
    """An auxiliary head in training, an optional argument, and state that its forward changes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.auxiliary = nn.Conv2d(8, 4, 1)
        self.register_buffer("runs", torch.zeros(1))
        self.seen = []

    def forward(self, x, scale=None):
        self.runs.add_(1)
        self.seen.append(1)
        random.random()
        y = self.norm(self.conv(x)) + torch.rand(1)
        if scale is not None:
            y = y * scale
        return (y, self.auxiliary(y)) if self.training else y


def called(region, mode):
    return [path for each, path, _ in module_calls([region]) if each == mode]


def test_eval_and_train_are_two_graphs_and_defaults_keep_their_value():
    region = trace(Branching())
    assert called(region, "eval") == ["conv", "norm"]
    assert called(region, "train") == ["conv", "norm", "auxiliary"]
    operations = [node.name for node in region.graphs["eval"].graph.nodes]
    assert not any("mul" in name for name in operations)
    assert any(
        "mul" in node.name for node in trace(Branching(), (torch.zeros(1, 3, 8, 8), 2.0)).graphs["eval"].graph.nodes
    )


def test_mixed_modes_are_a_third_graph():
    model = Branching()
    model.norm.eval()
    assert called(trace(model), "mixed") == ["conv", "norm", "auxiliary"]


def test_the_live_model_is_not_touched():
    model = Branching()
    model.norm.eval()
    fired = []
    model.register_forward_hook(lambda *_: fired.append(1))
    model.conv.register_forward_pre_hook(lambda *_: fired.append(2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random.seed(0)
    torch.manual_seed(0)
    region = trace(model, (torch.zeros(2, 3, 8, 8),))
    expected = random.Random(0).random(), torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert (random.random(), torch.rand(1).item()) == expected
    assert fired == model.seen == []
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    weights = [graph.get_submodule("conv").weight for graph in region.graphs.values()]
    assert all(weight is weights[0] is not model.conv.weight for weight in weights)  # one copy for all graphs


def test_shapes_come_with_example_inputs():
    region = trace(Branching(), (torch.zeros(2, 3, 8, 8),))
    nodes = {node.name: node for node in region.graphs["eval"].graph.nodes}
    assert tuple(nodes["conv"].meta["val"].shape) == (2, 8, 6, 6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.zeros(2, 4, 8, 8),),
            r"\[2, 4, 8, 8\] do not fit the model at layer 'conv': .*expected input.*3 channels",
        ),
        ((torch.zeros(2, 3, 8, 8), 1.0, 1.0), "example_inputs has 3 tensors, the model's forward takes 2"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(InputError, match=message) as error:
        trace(Branching(), inputs)
    assert "While executing" not in str(error.value)


class Choosy(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_can_not_be_traced_is_named_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), Choosy()))
    with pytest.raises(
        InputError, match=r"can't trace submodule '1.1' \(Choosy\) in eval mode: .*\nCompile the traceable"
    ):
        trace(model)
    with pytest.raises(InputError, match=r"can't trace Choosy in eval mode"):
        trace(Choosy())


def _fit(window, size):
    """Writes to its argument, as torchvision's Swin3d does."""
    window[0] = min(window[0], size)
    return window


torch.fx.wrap("_fit")


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.conv(x)[:, :, : _fit([7], x.shape[2])[0]]


def test_functions_may_write_to_lists_that_they_are_given():
    graph = trace(Windowed(), (torch.zeros(2, 3, 4, 4),)).graphs["eval"]
    assert list(graph.graph.nodes)[-1].meta["val"].shape == (2, 8, 4, 4)


def test_a_forward_replaced_on_the_instance_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model.forward = lambda x: x
    with pytest.raises(InputError, match=r"Sequential\.forward was replaced on the instance"):
        trace(model)


def test_random_state_is_put_back_after_an_error():
    def fail():
        torch.rand(5)
        raise RuntimeError("inside")

    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="inside"), preserved_random_state():
        fail()
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
