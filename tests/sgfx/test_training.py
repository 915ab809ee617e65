"""The trainer: its arithmetic against closed forms, what it leaves untouched, and its refusals."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from passes.errors import InputError
from sgfx.history import EpochRecord
from sgfx.schedules import checked_schedule, learning_rate
from sgfx.training import Trainer


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # the numbers here are those of the CPU, on machines with a GPU too


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from more, which cost much time where cores are busy
    yield
    torch.set_num_threads(threads)


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


def test_the_papers_schedule():
    schedule = checked_schedule((100, 150))
    rates = [learning_rate(schedule, 0.1, epoch, 200) for epoch in range(1, 201)]
    assert rates == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)


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


# What is left behind


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_model_is_usable(error):
    model = network()
    model[1].eval()
    modes, attributes, before = [module.training for module in model.modules()], set(vars(model)), states()
    with pytest.raises(error):
        trainer(model, Interrupted(error()), mixed_precision="bf16").fit()
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert states() == before
    assert model(torch.ones(2, 2)).dtype == torch.float32
    assert trainer(model, epochs=10, mixed_precision="bf16").fit().epochs[-1].train_top1 > 0.9


def test_an_exception_in_validation_puts_modes_back():
    model = network()
    with pytest.raises(RuntimeError, match="disk"):
        trainer(model, val=Interrupted(RuntimeError("disk"))).fit()
    assert all(module.training for module in model.modules())


def test_the_model_is_trained_in_place_and_not_wrapped():
    model = network()
    parameters, attributes, forward = list(model.parameters()), set(vars(model)), model.forward
    before = copy.deepcopy(model)
    trainer(model, mixed_precision="bf16").fit()
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert set(vars(model)) == attributes
    assert model.forward == forward
    assert not same_weights(before, model)
    assert all(parameter.grad is None for parameter in parameters)


def test_mixed_precision_is_each_trainers_own():
    seen: list[torch.dtype] = []
    model = network()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainers = [trainer(model, batches(96), mixed_precision=precision) for precision in (None, "bf16", None, "bf16")]
    for each in trainers:
        each.fit()
    assert seen == [torch.float32, torch.bfloat16] * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_trainer_may_run_inside_another():
    inner = trainer(mixed_precision=None)
    data, expected = batches(), trainer(mixed_precision="bf16").fit()

    class Nesting:
        def __iter__(self):
            for batch in data:
                inner.fit()
                yield batch

    assert trainer(data=Nesting(), mixed_precision="bf16").fit() == expected


@pytest.fixture
def own_accelerator() -> Iterator[accelerate.Accelerator]:
    """One that a caller made, in a process without any other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_callers_own_accelerator_goes_on_and_has_no_say(own_accelerator):
    model, alone = network(), network()
    with own_accelerator.accumulate(model):  # the first of four steps, in which its optimizers wait
        trainer(model).fit()
        assert not own_accelerator.sync_gradients
    assert own_accelerator.mixed_precision == "bf16"
    assert own_accelerator.gradient_accumulation_steps == 4
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer(alone).fit()
    assert same_weights(model, alone)


def test_variables_of_a_launcher_have_no_say(monkeypatch):
    launched, alone = network(), network()
    trainer(alone).fit()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer(launched).fit()
    assert same_weights(launched, alone)


def test_accelerates_state_is_left_as_it_was():
    singletons = (PartialState, AcceleratorState, GradientState)
    before = [dict(singleton._shared_state) for singleton in singletons]
    trainer(mixed_precision="bf16").fit()
    assert [dict(singleton._shared_state) for singleton in singletons] == before


def test_a_frozen_norm_stays_in_eval():
    model = network()
    model[1].eval()
    mean, variance = model[1].running_mean.clone(), model[1].running_var.clone()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append([m.training for m in module.modules()]))
    trainer(model, val=batches(), epochs=2).fit()
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(model[1].running_var, variance)
    frozen, evaluating = [True, True, False, True, True, True], [False] * 6
    assert seen == ([frozen] * 6 + [evaluating] * 6) * 2
    assert [module.training for module in model.modules()] == frozen


def test_a_model_in_eval_mode_trains_and_is_put_back():
    model = network().eval()
    mean = model[1].running_mean.clone()
    trainer(model).fit()
    assert not torch.equal(model[1].running_mean, mean)
    assert not any(module.training for module in model.modules())


def test_frozen_parameters_are_untouched():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    trainer(model).fit()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


def test_gradients_from_before_have_no_effect():
    fresh, stale = network(), network()
    stale(batches()[0][0]).sum().backward()
    stale.load_state_dict(fresh.state_dict())
    trainer(fresh).fit()
    trainer(stale).fit()
    assert same_weights(fresh, stale)


def test_progress_bars_are_shown_on_request_only(capfd):
    trainer(val=batches()).fit()
    assert capfd.readouterr() == ("", "")
    record = trainer(val=batches(), progress=True).fit().epochs[-1]
    shown = capfd.readouterr().err
    assert f"loss={record.loss:.3g}" in shown
    assert "val_top1=" in shown


def test_importing_it_does_not_import_accelerate():
    code = "import sys, sgfx.training; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_on_a_gpu(precision, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    model = network()
    record = trainer(model, val=batches(seed=1), epochs=10, mixed_precision=precision).fit().epochs[-1]
    assert record.val_top1 > 0.95
    assert all(parameter.is_cuda and parameter.dtype == torch.float32 for parameter in model.parameters())


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, InputError, "epochs must be at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, not 1.5"),
        ({"epochs": True}, TypeError, "epochs must be an integer, not True"),
        ({"lr": 0}, InputError, "lr must be above 0"),
        ({"lr": -0.1}, InputError, "lr must be at least 0 and below inf, not -0.1"),
        ({"lr": math.nan}, InputError, "lr must be .* not nan"),
        ({"lr": math.inf}, InputError, "lr must be .* not inf"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, not '0.1'"),
        ({"momentum": 1}, InputError, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -1e-4}, InputError, "weight_decay must be at least 0"),
        ({"label_smoothing": 1.0}, InputError, "label_smoothing must be at least 0 and below 1"),
        ({"label_smoothing": math.nan}, InputError, "label_smoothing must be .* not nan"),
        ({"seed": -1}, InputError, "seed must be at least 0"),
        ({"seed": 2**32}, InputError, "seed must be .* below 4294967296"),
        ({"schedule": "step"}, InputError, "unknown schedule 'step'; choose 'constant', 'cosine' or the epochs"),
        ({"schedule": 30}, TypeError, "schedule must be 'constant', 'cosine' or the epochs .* not 30"),
        ({"schedule": (150, 100)}, InputError, r"each after the last, not \(150, 100\)"),
        ({"schedule": (30, 30)}, InputError, "each after the last"),
        ({"schedule": (0, 30)}, InputError, "integers from 1"),
        ({"schedule": (0.5,)}, InputError, "must be integers"),
        ({"mixed_precision": "fp8"}, InputError, "mixed_precision must be 'bf16' or 'fp16' or None, not 'fp8'"),
        ({"model": "resnet20"}, TypeError, "model must be a torch.nn.Module, not str"),
        ({"data": toy()}, TypeError, "train_data must be an iterable of batches .* not TensorDataset"),
        ({"data": iter([])}, InputError, "train_data is a list_iterator, which runs dry"),
        ({"val": (batch for batch in ())}, InputError, "val_data is a generator, which runs dry after one epoch"),
    ],
)
def test_options_are_checked_before_anything_runs(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (torch.zeros(2, 2), "a Tensor"),
        ((torch.zeros(4, 2),), "a tuple of 1"),
        ([torch.zeros(4, 2), torch.zeros(4), torch.zeros(4)], "a list of 3"),
        ({"inputs": torch.zeros(4, 2), "targets": torch.zeros(4)}, "a dict"),
        ((torch.zeros(2), 1), "a tuple of 2"),
    ],
)
def test_a_batch_that_is_no_pair(batch, given):
    message = rf"train_data must give batches \(inputs, targets\).* batch 2 of epoch 1 is {given}: change the dataset"
    with pytest.raises(InputError, match=message):
        trainer(data=[batches()[0], batch]).fit()


def test_empty_data():
    with pytest.raises(InputError, match=r"train_data gave no batches in epoch 1.*pass a DataLoader or a list"):
        trainer(data=DataLoader(toy(4), 16, drop_last=True)).fit()
    with pytest.raises(InputError, match="val_data gave no batches in epoch 1"):
        trainer(val=[]).fit()


def test_data_that_runs_dry():
    class Once:
        def __init__(self):
            self.rest = iter(batches())

        def __iter__(self):
            return self.rest

    with pytest.raises(InputError, match=r"train_data gave no batches in epoch 2: .* anew each time"):
        trainer(data=Once(), epochs=2).fit()


def test_a_model_with_nothing_to_train():
    with pytest.raises(InputError, match="nothing to train: no parameter with requires_grad=True"):
        trainer(network().requires_grad_(False)).fit()


class Twofold(nn.Module):
    """Gives two outputs, as a model with an auxiliary head does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(inputs), self.head(inputs)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Twofold(), None, r"gave tuple for \[16\].*wrapper"),
        (nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1))), None, r"gave \[16, 3, 1\] for \[16\]"),
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.eye(4)[:, :3])], r"gave \[4, 3\] for \[4, 3\].*class indices"),
    ],
)
def test_logits_and_targets_of_another_form(model, data, message):
    with pytest.raises(InputError, match=message):
        trainer(model, data).fit()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(poison):
    model, data = nn.Linear(2, 3), batches()
    twin = copy.deepcopy(model)
    trainer(twin, data[:2]).fit()
    data[2] = (torch.full((16, 2), poison), data[2][1])
    with pytest.raises(FloatingPointError, match=r"the loss became nan in step 3 of epoch 1; try an lr below 0\.1"):
        trainer(model, data).fit()
    assert same_weights(model, twin)  # those before the step that failed


def test_fp16_without_a_gpu():
    with pytest.raises(InputError, match=r"mixed_precision='fp16' needs a GPU.*use 'bf16' or None"):
        trainer(mixed_precision="fp16").fit()


def test_several_processes(monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match="runs in one process, not 2"):
        trainer().fit()


def test_records_are_frozen():
    record = trainer().fit().epochs[0]
    assert isinstance(record, EpochRecord)
    with pytest.raises(AttributeError, match="cannot assign"):
        record.loss = 0.0
