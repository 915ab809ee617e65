"""What the trainer refuses, before or while it trains."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from passes.errors import InputError
from sgfx.training.accelerator import PROCESSES
from sgfx.training.history import EpochRecord
from sgfx.training.loading import Source
from sgfx.training.tasks.classification import Classification
from tests.sgfx.test_training import batches, network, same_weights, toy, trainer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, InputError, "epochs must be at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, not 1.5"),
        ({"epochs": True}, TypeError, "epochs must be an integer, not True"),
        ({"lr": 0}, InputError, "lr must be above 0"),
        ({"lr": -0.1}, InputError, "lr must be above 0 and finite, not -0.1"),
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
        ({"task": "detction"}, InputError, "unknown task 'detction'; choose 'classification'"),
        ({"ema": 1.0}, InputError, "ema must be above 0 and below 1, not 1.0"),
        ({"ema": 0}, InputError, "ema must be above 0 and below 1, not 0; None is without"),
        ({"clip_norm": 0.0}, InputError, "clip_norm must be above 0 and finite, not 0.0; None is without"),
        ({"accumulate": 0}, InputError, "accumulate must be at least 1"),
        ({"iterations": 2.5}, TypeError, "iterations must be an integer"),
        ({"warmup": 1}, InputError, r"warmup \(1 epochs\) must be shorter than training \(1 epochs\)"),
        (
            {"epochs": 9, "warmup": 4, "schedule": (3,)},
            InputError,
            "after epoch 3, within the 4 epochs of warm-up",
        ),
        ({"optimizer": "adam"}, TypeError, "optimizer must be callable, not 'adam'"),
        ({"loss": 3}, TypeError, "loss must be callable"),
        ({"loss": max, "label_smoothing": 0.1}, InputError, "label_smoothing is of the loss that loss= takes"),
        ({"loss": max, "teacher": nn.Identity()}, InputError, "loss is of labels, and a teacher's"),
        ({"patience": 2}, InputError, "patience waits for better results on val_data"),
        ({"resume": True}, InputError, "resume goes on from a checkpoint: give its folder"),
        ({"checkpoint_steps": 5}, InputError, "checkpoint_steps writes files: give folder"),
        ({"tracker": "tensorboard"}, InputError, "tracker writes files: give folder"),
        ({"tracker": "wandb", "folder": "x"}, InputError, "tracker must be 'tensorboard' or None, not 'wandb'"),
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
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.zeros(4, 2))], r"gave \[4, 3\] for \[4, 2\].*class indices"),
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.eye(4)[:, :3])], "targets .* must be probabilities"),
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.ones(4, 3).long())], "probabilities.* those of torch.int64"),
        (
            nn.Linear(2, 3),
            [(torch.zeros(4, 2), torch.arange(4))],
            r"targets go from 0 to 3, but .* 3 classes \(0 to 2\)",
        ),
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.arange(4) - 1)], "targets go from -1 to 2, but"),
        (nn.Linear(2, 3), [(torch.zeros(4, 2), torch.zeros(4))], "must be class indices, int64, not torch.float32"),
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


def test_more_processes_than_were_said(monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match=r"one of 1 processes \(says this process\), and accelerate sees 2"):
        trainer().fit()


@pytest.mark.parametrize("variable", ["MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_that_accelerate_does_not_join(variable, monkeypatch):
    model = network()
    before = copy.deepcopy(model)
    monkeypatch.setenv(variable, "2")
    message = rf"one of 2 processes \(says {variable}\), and accelerate sees 1: each would train a model of its own"
    with pytest.raises(InputError, match=message):
        trainer(model).fit()
    assert same_weights(model, before)


def test_several_processes_that_cannot_be_joined(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("MASTER_ADDR expected, but not set")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate.Accelerator, "__init__", refuse)
    with pytest.raises(InputError, match=r"one of 2 processes \(says WORLD_SIZE\).*MASTER_ADDR expected.*torchrun"):
        trainer().fit()


def test_several_processes_of_ones_own(monkeypatch):
    made = trainer()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(InputError, match=r"one of 3 processes \(says torch.distributed\)"):
        made.fit()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (batches(), "train_data is a list: with several processes it must be a DataLoader"),
        (
            DataLoader(toy(), 16, sampler=DistributedSampler(toy(), num_replicas=2, rank=0)),
            "the DistributedSampler of train_data would divide what is divided",
        ),
    ],
)
def test_data_that_several_processes_cannot_share(data, message):
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(InputError, match=message):
        Source(data, "train_data", Classification(), two, seed=0, shown=False)


def test_a_launcher_of_one_process(monkeypatch):
    for variable in PROCESSES:
        monkeypatch.setenv(variable, "1")
    assert len(trainer().fit().epochs) == 1


def test_records_are_frozen():
    record = trainer().fit().epochs[0]
    assert isinstance(record, EpochRecord)
    with pytest.raises(AttributeError, match="cannot assign"):
        record.loss = 0.0
