"""Where memory runs out, that is what is said, and nothing about what was given to sgfx."""

import re

import pytest
import torch
from torch import nn

import sgfx
from passes.errors import InputError
from passes.models.copying import copy_model, unhooked_copy

ERRORS = [
    MemoryError("Unable to allocate 8.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried 8 GiB"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB"),
    OSError(12, "Cannot allocate memory"),
]


class Held:
    """Fails to be copied."""

    error: Exception

    def __deepcopy__(self, memo):
        raise self.error


class Hungry(nn.Module):
    """Computes, until `error` is set."""

    error: Exception | None = None

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return self.fc(self.conv(self.first(x)).relu().mean((2, 3)))


def passes_through(error):
    return pytest.raises(type(error), match=re.escape(str(error)))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copy", [copy_model, unhooked_copy])
def test_copying(copy, error, monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].held = Held()
    monkeypatch.setattr(Held, "error", error, raising=False)
    with passes_through(error):
        copy(model)
    monkeypatch.setattr(Held, "error", RuntimeError("a lock"))
    with pytest.raises(InputError, match=r"module '0' \(Linear\) holds 'held' \(Held\), which can't be copied: a lock"):
        copy(model)


X = torch.zeros(2, 3, 9, 9)
USES = {
    "compile": lambda dense, small: sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=X),
    "freeze": lambda dense, small: sgfx.freeze(small, X, strategy="library", progress=False),
    "calibrate": lambda dense, small: sgfx.calibrate(dense, small, X),
    "distill": lambda dense, small: sgfx.distill(dense, small, X, steps=1),
    "report": lambda dense, small: sgfx.report(dense, small, X),
    "verify": lambda dense, small: sgfx.verify(dense, small, X),
    "export": lambda dense, small: sgfx.export(small, "unwritten.pt2", X),
}


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_users_call(use, error, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dense = Hungry().eval()
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=X)
    monkeypatch.setattr(Hungry, "error", error)
    with passes_through(error):
        use(dense, small)


def test_a_criterion(monkeypatch):
    def criterion(weight):
        raise ERRORS[1]

    with passes_through(ERRORS[1]):
        sgfx.compile(Hungry(), groups=2, ratio=0.5, criterion=criterion)
