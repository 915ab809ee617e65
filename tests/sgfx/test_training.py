"""The trainer: its arithmetic against closed forms, and what is random in it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sgfx.training.schedules import checked_schedule, scheduler
from sgfx.training.trainer import Trainer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(examples: int = 96, seed: int = 0) -> TensorDataset:
    """Three classes around three far corners of a plane."""
    targets = torch.arange(examples) % 3
    centres = torch.tensor([[4.0, 0.0], [-4.0, 4.0], [0.0, -4.0]])
    return TensorDataset(centres[targets] + torch.randn(examples, 2, generator=generator(seed)), targets)


def batches(size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(inputs, targets) for inputs, targets in DataLoader(toy(seed=seed), size)]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def trainer(model: nn.Module | None = None, data: Any = None, val: Any = None, **options: Any) -> Trainer:
    options = {"epochs": 1, "lr": 0.1, "progress": False} | options
    return Trainer(network() if model is None else model, batches() if data is None else data, val, **options)


def states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [random.getstate(), torch.get_rng_state().tolist(), kind, list(keys), *rest]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Interrupted:
    """Batches, and in place of the fourth an exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random.random(), np.random.rand(), torch.rand(1)
        yield from batches()[:3]
        raise self.error


# Arithmetic


def test_it_learns_a_separable_problem():
    history = trainer(val=batches(seed=1), epochs=10).fit()
    assert [record.epoch for record in history.epochs] == list(range(1, 11))
    assert history.epochs[-1].loss < 0.3 * history.epochs[0].loss
    assert history.epochs[-1].train_top1 > 0.95
    assert history.epochs[-1].val_top1 > 0.95


def test_two_steps_against_the_update_by_hand():
    model = nn.Linear(2, 3).double()
    data = [(inputs.double(), targets) for inputs, targets in batches()[:2]]
    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    velocities = [torch.zeros_like(weight) for weight in weights]
    losses = []
    for inputs, targets in data:
        losses.append(F.cross_entropy(F.linear(inputs, *weights), targets))
        for weight, velocity, gradient in zip(
            weights, velocities, torch.autograd.grad(losses[-1], weights), strict=True
        ):
            velocity.mul_(0.8).add_(gradient + 0.05 * weight.detach())
            weight.data -= 0.3 * velocity
    history = trainer(model, data, lr=0.3, momentum=0.8, weight_decay=0.05).fit()
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=0, atol=1e-14)
    assert history.epochs[0].loss == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-14)


def test_epoch_means_weigh_batches_by_their_size():
    inputs, targets = toy(40).tensors
    data = [(inputs[:32], targets[:32]), (inputs[32:], targets[32:])]
    model = nn.Linear(2, 3)
    still = {"lr": 1e-30, "weight_decay": 0}
    record = trainer(model, data, **still).fit().epochs[0]
    with torch.no_grad():
        logits = model(inputs)
    assert record.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert record.train_top1 == (logits.argmax(1) == targets).sum().item() / 40


def test_label_smoothing_is_that_of_torch():
    model, data = nn.Linear(2, 3), batches(96)
    expected = F.cross_entropy(model(data[0][0]), data[0][1], label_smoothing=0.3).item()
    plain = F.cross_entropy(model(data[0][0]), data[0][1]).item()
    assert trainer(copy.deepcopy(model), data, label_smoothing=0.3).fit().epochs[0].loss == expected
    assert trainer(copy.deepcopy(model), data).fit().epochs[0].loss == plain != expected


def test_validation_top1_against_a_direct_computation():
    model, val = network(), batches(20, seed=5)
    record = trainer(model, val=val, lr=0.01).fit().epochs[0]
    model.eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*val, strict=True))
    assert record.val_top1 == (model(inputs).argmax(1) == targets).sum().item() / 96
    assert 0 < record.val_top1 < 1


def test_no_validation_data_gives_none():
    assert trainer().fit().epochs[0].val_top1 is None


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda epoch: 0.4),
        ("cosine", lambda epoch: 0.2 * (1 + math.cos(math.pi * (epoch - 1) / 6))),
        ((2, 4), lambda epoch: 0.4 if epoch <= 2 else 0.04 if epoch <= 4 else 0.004),
        ([1], lambda epoch: 0.4 if epoch <= 1 else 0.04),
    ],
)
def test_lr_of_each_epoch(schedule, formula):
    history = trainer(data=batches(48), epochs=6, lr=0.4, schedule=schedule).fit()
    assert [record.lr for record in history.epochs] == pytest.approx([formula(epoch) for epoch in range(1, 7)])


def test_the_schedules_lr_is_the_one_that_is_used():
    model, data = nn.Linear(2, 3).double(), [(inputs.double(), targets) for inputs, targets in batches(96)]
    twin = copy.deepcopy(model)
    trainer(model, data, epochs=2, lr=0.5, schedule=(1,), momentum=0, weight_decay=0).fit()
    for lr in (0.5, 0.05):
        gradients = torch.autograd.grad(F.cross_entropy(twin(data[0][0]), data[0][1]), list(twin.parameters()))
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.data -= lr * gradient
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=1e-14)


def rates(schedule: Any, epochs: int, warmup: int = 0, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    made = scheduler(optimizer, checked_schedule(schedule, epochs, warmup), epochs, warmup)
    used = []
    for _ in range(epochs):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return used


def test_the_papers_schedule():
    assert rates((100, 150), 200) == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)


def test_warm_up_goes_up_in_equal_steps_and_milestones_stay_where_they_were():
    assert rates((5, 7), 9, warmup=3) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert rates("constant", 4, warmup=1) == pytest.approx([0.05, 0.1, 0.1, 0.1])
    falling = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates("cosine", 6, warmup=2) == pytest.approx([0.1 / 3, 0.2 / 3, *falling])


# Randomness


def test_a_seed_gives_the_same_weights_bit_for_bit():
    made = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        model = network()
        history = trainer(model, DataLoader(toy(), 16, shuffle=True), epochs=2, seed=7).fit()
        made.append((model, history))
    assert same_weights(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    other = network()
    trainer(other, DataLoader(toy(), 16, shuffle=True), epochs=2, seed=8).fit()
    assert not same_weights(made[0][0], other)


def test_all_three_generators_are_seeded():
    drawn = []

    class Drawing:
        def __iter__(self):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return iter(batches())

    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        trainer(data=Drawing()).fit()
    assert drawn[0] == drawn[1]


def test_a_loaders_own_generator_is_the_users():
    made = []
    for own in (1, 2):
        model = network()
        trainer(model, DataLoader(toy(), 16, shuffle=True, generator=generator(own))).fit()
        made.append(model)
    assert not same_weights(*made)


def test_validation_has_no_influence_on_training():
    alone, watched = network(), network()
    trainer(alone, DataLoader(toy(), 16, shuffle=True), epochs=2).fit()
    trainer(watched, DataLoader(toy(), 16, shuffle=True), DataLoader(toy(seed=3), 16, shuffle=True), epochs=2).fit()
    assert same_weights(alone, watched)


def test_the_global_random_state_is_as_before():
    before = states()
    trainer(data=DataLoader(toy(), 16, shuffle=True), val=DataLoader(toy(), 16)).fit()
    assert states() == before
