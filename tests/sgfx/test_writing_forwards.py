"""Forwards that write to parameters and buffers: whatever sgfx does with a model, the model itself stays as it was."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import sgfx

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Renormed(nn.Conv2d):
    """Max-norm: the weight is brought below a norm before it is used."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class RenormedInPlace(nn.Conv2d):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_((0.5 / self.weight.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1))
        return super().forward(x)


class Replaced(nn.Conv2d):
    def forward(self, x):
        self.weight = nn.Parameter(self.weight.detach() * 0.9)
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, conv=nn.Conv2d, wrapped=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.special = conv(8, 8, 3, padding=1)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.register_buffer("calls", torch.zeros(()))

    def write(self):
        pass

    def forward(self, x):
        self.write()
        y = self.special(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(self.conv2(y)).mean((2, 3)))


class InForward(Net):
    """The same by the code of the model, which torch.fx runs."""

    def write(self):
        self.special.weight.data = torch.renorm(self.special.weight.data, 2, 0, 0.5)
        self.special.bias.data.add_(1)


class Momentum(Net):
    """An encoder that follows another one by a moving average, in training."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.conv1)

    def write(self):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.conv1.parameters(), strict=True):
                    slow.copy_(0.5 * slow + 0.5 * fast + 0.1)
                torch._foreach_mul_(list(self.special.parameters()), 0.9)
        self.calls += 1


class Branching(Net):
    """What torch.fx can't trace, so that it is run."""

    def write(self):
        self.special.weight.data.mul_(0.9)
        self.special.weight.data = self.special.weight.data + 0.1
        self.fc.bias = nn.Parameter(self.fc.bias.detach() + 1)

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


MODELS = {
    "max-norm": lambda: Net(Renormed),
    "max-norm in place": lambda: Net(RenormedInPlace),
    "a new parameter": lambda: Net(Replaced),
    "in the model's forward": InForward,
    "momentum": Momentum,
    "run": Branching,
}


def dense_model(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model


def state(model):
    """Each tensor by its name: the object, where it lies, its version, its numbers, its gradient."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (id(x), x.data_ptr(), x.device, x._version, x.detach().clone(), x.grad is None or x.grad.clone())
        for name, x in tensors
    }


def same(before, after):
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert old[:4] == new[:4], name
        assert torch.equal(old[4], new[4]), name
        assert old[5] is new[5] is True or torch.equal(old[5], new[5]), name


def small_of(dense):
    return sgfx.compile(copy.deepcopy(dense), groups=3, ratio=0.6, example_inputs=IMAGES)


HEAVY = ("budget", "eliminate", "export", "freeze")
ACTIONS = {
    "compile": lambda dense, _: sgfx.compile(dense, groups=3, ratio=0.6),
    "compile with inputs": lambda dense, _: sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=IMAGES),
    "eliminate": lambda dense, _: sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=IMAGES, eliminate=True),
    "leaves": lambda dense, _: sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=IMAGES, leaf_modules="special"),
    "budget": lambda dense, _: sgfx.compile(dense, budget={"params": 0.8}, calibration=IMAGES, example_inputs=IMAGES),
    "Pruner": lambda dense, _: next(iter(sgfx.Pruner(dense, groups=3, ratio=0.6, step=0.3, example_inputs=IMAGES))),
    "report": lambda dense, small: sgfx.report(dense, small, IMAGES),
    "verify": lambda dense, small: sgfx.verify(dense, small, IMAGES),
    "freeze": lambda _, small: sgfx.freeze(small, IMAGES, strategy="library"),
    "export": lambda _, small: sgfx.export(small, "small.pt2", IMAGES),
    "calibrate": lambda dense, small: sgfx.calibrate(dense, small, IMAGES),
    "distill": lambda dense, small: sgfx.distill(dense, small, IMAGES, steps=2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:not calibrated")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_models_themselves_stay_as_they_were(name, action, tmp_path, monkeypatch):
    if action in HEAVY and name not in ("max-norm", "momentum"):
        pytest.skip("it would take long, and show no more")
    monkeypatch.chdir(tmp_path)
    dense = dense_model(name)
    small = small_of(dense)
    before, modes, theirs = state(dense), [module.training for module in dense.modules()], state(small)
    with contextlib.suppress(ValueError):  # it may refuse, if only it leaves the model alone
        ACTIONS[action](dense, small)
    same(before, state(dense))
    if action not in ("calibrate", "distill"):
        same(theirs, state(small))
    assert [module.training for module in dense.modules()] == modes
