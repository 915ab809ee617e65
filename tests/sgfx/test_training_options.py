"""What the trainer's options do, against the same by hand or by torch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import sgfx
from passes.errors import InputError
from sgfx.training import run_folder
from sgfx.training.optimizing import parameter_groups
from tests.sgfx.test_training import batches, generator, network, same_weights, toy, trainer

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 3).double()


def doubles(size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(inputs.double(), targets) for inputs, targets in batches(size)]


def descend(model, data, lr, change=lambda gradients: None, after=lambda: None):
    """Plain gradient descent, a step a batch."""
    parameters = list(model.parameters())
    for inputs, targets in data:
        gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)
        change(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= lr * gradient
        after()


def close(one: nn.Module, other: nn.Module) -> bool:
    return torch.allclose(one.weight, other.weight, rtol=0, atol=1e-14)


# Steps


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_make_the_step_of_one_large_batch(accumulate):
    model, twin = linear(), linear()
    trainer(model, doubles(), lr=0.3, accumulate=accumulate, **PLAIN).fit()  # 6 batches
    descend(twin, doubles(16 * accumulate), 0.3)
    assert close(model, twin)


def test_batches_left_at_the_end_of_an_epoch_make_a_step_of_their_own():
    model, twin = linear(), linear()
    trainer(model, doubles(), lr=0.3, accumulate=4, **PLAIN).fit()
    whole = [torch.cat(parts) for parts in zip(*doubles(), strict=True)]
    descend(twin, [(whole[0][:64], whole[1][:64]), (whole[0][64:], whole[1][64:])], 0.3)
    assert close(model, twin)


def test_clipping():
    model, twin = linear(), linear()
    norms = []

    def clip(gradients):
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        for gradient in gradients:
            gradient.mul_(min(1.0, 2 / (norms[-1] + 1e-6)))  # torch's guard against 0

    trainer(model, doubles(), lr=0.3, clip_norm=2, **PLAIN).fit()
    descend(twin, doubles(), 0.3, clip)
    assert close(model, twin)
    assert min(norms) < 2 < max(norms)


def test_decay_spares_norms_and_biases():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.LayerNorm([4, 4]))
    model.extra = sgfx.compile(nn.Sequential(nn.Linear(8, 8)), ratio=0.5, overrides={"0": {"ratio": 0.5}})
    decayed, free = parameter_groups(model, 0.1, decay_norms=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(x)] for x in decayed["params"]] == ["0.weight", "extra.0.weight"]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    (one,) = parameter_groups(model, 0.1, decay_norms=True)
    assert len(one["params"]) == len(list(model.parameters()))


def test_an_optimizer_of_ones_own():
    model, twin = network(), network()
    own = partial(torch.optim.AdamW, betas=(0.8, 0.9))
    model[3].p = twin[3].p = 0.0
    trainer(model, lr=0.01, optimizer=own, weight_decay=0.2, epochs=2, schedule=(1,)).fit()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    for epoch in range(2):
        for inputs, targets in batches():
            optimizer.zero_grad()
            F.cross_entropy(twin(inputs), targets).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] /= 10 ** (epoch + 1)
    assert same_weights(model, twin)


def test_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"optimizer must give a torch.optim.Optimizer, not dict"):
        trainer(optimizer=lambda groups, lr: {}).fit()


def test_a_loss_of_ones_own():
    model, twin = linear(), linear()
    history = trainer(model, doubles(96), lr=0.3, loss=F.multi_margin_loss, **PLAIN).fit()
    inputs, targets = doubles(96)[0]
    expected = F.multi_margin_loss(twin(inputs), targets)
    assert history.epochs[0].loss == expected.item()
    expected.backward()
    assert torch.allclose(model.weight, twin.weight - 0.3 * twin.weight.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (partial(F.cross_entropy, reduction="none"), r"a tensor \[16\]"),
        (lambda logits, targets: 1.0, "float"),
        (lambda logits, targets: logits.detach().mean(), r"a tensor \[\]"),
    ],
)
def test_what_is_no_loss(loss, given):
    with pytest.raises(InputError, match=f"loss must give one number that has a gradient.* not {given}"):
        trainer(loss=loss).fit()


# Averages


def test_averages_are_those_of_torch_and_are_what_is_validated():
    model, twin = linear(), linear()
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    val = doubles(48)
    made = trainer(model, doubles(), val, lr=0.3, ema=0.9, **PLAIN)
    record = made.fit().epochs[0]
    descend(twin, doubles(), 0.3, after=lambda: averaged.update_parameters(twin))
    assert close(model, twin)
    assert close(made.averaged, averaged.module)
    assert not close(made.averaged, model)
    hits = sum(int((averaged.module(inputs).argmax(1) == targets).sum()) for inputs, targets in val)
    assert record.val_top1 == hits / 96


def test_averages_keep_hooks_and_leave_their_owner_alone():
    model = network()
    seen: list[str] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append("run"))
    made = trainer(model, val=batches(96), ema=0.5)
    made.fit()
    assert len(seen) == 7  # six batches, and the validation of the averages
    assert made.averaged[1].running_mean.abs().sum() > 0
    assert trainer(model).averaged is None


# Targets, batches, results


def test_soft_labels():
    model, twin = linear(), linear()
    data = [(inputs, F.one_hot(targets, 3).double()) for inputs, targets in doubles()]
    soft = trainer(model, data, data, lr=0.3, label_smoothing=0.1).fit()
    hard = trainer(twin, doubles(), doubles(), lr=0.3, label_smoothing=0.1).fit()
    assert close(model, twin)
    assert soft.epochs[0].val_top1 == hard.epochs[0].val_top1
    assert soft.epochs[0].train_top1 == hard.epochs[0].train_top1


def test_mixup_of_torchvision():
    images = torch.randn(32, 1, 4, 4, generator=generator())
    data = DataLoader(TensorDataset(images, torch.arange(32) % 3), 16, shuffle=True)
    made = []
    for transform in (v2.MixUp(num_classes=3), v2.MixUp(num_classes=3), None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        trainer(model, data, transform=transform, epochs=2).fit()
        made.append(model)
    assert same_weights(made[0], made[1])
    assert not same_weights(made[0], made[2])


def test_a_transform_sees_training_alone_and_inputs_without_labels_too():
    seen = []

    def transform(*batch):
        seen.append(len(batch))
        return batch if len(batch) == 2 else batch[0]

    trainer(val=batches(), transform=transform).fit()
    assert seen == [2] * 6
    trainer(data=[inputs for inputs, _ in batches()], transform=transform, teacher=network(1), weight_decay=0.0).fit()
    assert seen == [2] * 6 + [1] * 6
    with pytest.raises(InputError, match=r"transform must give \(inputs, targets\) of a batch, not Tensor"):
        trainer(transform=lambda inputs, targets: inputs).fit()


def test_top5_against_a_direct_count():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 10), torch.randn(90, 4), torch.arange(90) % 10
    val = [(inputs[:60], targets[:60]), (inputs[60:], targets[60:])]
    record = trainer(copy.deepcopy(model), val, val, lr=1e-30, weight_decay=0.0).fit().epochs[0]
    best = model(inputs).topk(5).indices
    expected = {"top1": (best[:, 0] == targets).sum().item() / 90, "top5": (best == targets[:, None]).sum().item() / 90}
    assert record.val == record.train == expected
    assert record.val_top5 == expected["top5"] > expected["top1"]
    assert record.row() == {
        "epoch": 1, "lr": 1e-30, "loss": record.loss,
        **{f"{part}_{name}": value for part in ("train", "val") for name, value in expected.items()},
    }  # fmt: skip


# When it ends


def test_iterations_end_training_within_an_epoch():
    model, twin = linear(), linear()
    history = trainer(model, doubles(), epochs=5, iterations=8, lr=0.3, **PLAIN).fit()
    descend(twin, doubles() + doubles()[:2], 0.3)
    assert close(model, twin)
    assert [record.epoch for record in history.epochs] == [1, 2]


def test_patience():
    val = [(inputs, targets * 0) for inputs, targets in batches()]  # which get worse as training goes on
    history = trainer(val=val, epochs=30, patience=3, lr=0.05).fit()
    results = [record.val_top1 for record in history.epochs]
    assert len(results) < 30
    assert results.index(max(results)) == len(results) - 4


# Logs


def test_tensorboard_has_every_epoch_once(tmp_path, monkeypatch):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write, names = run_folder.replacing, []

    def replacing(path):
        names.append(path.name)
        if names.count("last.pt") == 2:
            raise KeyboardInterrupt
        return write(path)

    options = {"epochs": 2, "folder": tmp_path, "tracker": "tensorboard"}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "replacing", replacing)
        with pytest.raises(KeyboardInterrupt):  # the second epoch is in the logs, and in no checkpoint
            trainer(val=batches(), **options).fit()
    history = trainer(val=batches(), resume=True, **options).fit()
    found = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("val_top1")] == [1, 2]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([each.loss for each in history.epochs])


def test_the_log(tmp_path):
    history = trainer(val=batches(), epochs=2, folder=tmp_path).fit()
    first, second = history.epochs
    assert (tmp_path / "log.csv").read_text() == (
        "epoch,lr,loss,train_top1,val_top1\n"
        f"1,0.1,{first.loss},{first.train_top1},{first.val_top1}\n"
        f"2,0.1,{second.loss},{second.train_top1},{second.val_top1}\n"
    )


# Data


def test_loaders_are_left_as_they_were():
    data = DataLoader(toy(), 16, shuffle=True)
    trainer(data=data, val=DataLoader(toy(), 16, shuffle=True)).fit()
    assert data.sampler.generator is None
    assert data.generator is None


def test_samplers_and_datasets_are_told_which_epoch_it_is():
    told = []
    data = DataLoader(toy(), 16)
    data.dataset.set_epoch = told.append
    trainer(data=data, epochs=3).fit()
    assert told == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_on_a_gpu(precision, monkeypatch, tmp_path):
    """Pinned loading, averages, clipping, a checkpoint in the middle of an epoch and what goes on from it."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    options = {"ema": 0.9, "clip_norm": 1.0, "mixed_precision": precision, "accumulate": 2, "checkpoint_steps": 1}
    data = DataLoader(toy(), 16, shuffle=True, pin_memory=True)
    whole, cut = network(), network()
    history = trainer(whole, data, batches(), epochs=4, folder=tmp_path / "whole", **options).fit()
    assert history.epochs[-1].train_top1 > 0.8

    calls = []

    def stopping(inputs, targets):
        calls.append(inputs.device.type)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return inputs, targets

    given = {"epochs": 4, "folder": tmp_path / "cut", **options}
    with pytest.raises(KeyboardInterrupt):
        trainer(cut, data, batches(), transform=stopping, **given).fit()
    resumed = network()
    trainer(resumed, data, batches(), transform=stopping, resume=True, **given).fit()
    assert set(calls) == {"cuda"}
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
