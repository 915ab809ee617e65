"""Copies: everything but hooks is what it was."""

import torch
from torch import nn

from passes.models.copying import copy_model, unhooked_copy


class Hooking(nn.Module):
    """Names attributes as torch does those that hold hooks, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self._output_hooks_installed, self._more_hooks = True, {"own": [1]}
        self.bn, self.flags = nn.BatchNorm2d(4), (True, False)

    def forward(self, x):
        return self.bn(x)


def test_attributes_that_are_called_like_hooks_are_copied_as_they_are():
    model = Hooking()
    model.register_forward_hook(lambda *_: None)
    for make in (copy_model, unhooked_copy):
        twin = make(model)
        assert twin._output_hooks_installed is True
        assert twin._more_hooks == {"own": [1]}
        assert twin._more_hooks["own"] is not model._more_hooks["own"]
        assert (twin.bn.affine, twin.bn.track_running_stats, twin.flags) == (True, True, (True, False))
        assert len(twin._forward_hooks) == (make is copy_model)


def test_a_twin_shares_its_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first = unhooked_copy(model)
    second = unhooked_copy(model, first)
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.parameters(), first.parameters(), strict=True))
    assert first[1].running_mean is not second[1].running_mean
    assert torch.equal(first[0].weight, model[0].weight)
