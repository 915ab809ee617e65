"""Training that is gone on with: bit for bit the run that was never interrupted, wherever it was cut."""

from __future__ import annotations

import copy
import errno
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sgfx
from passes.errors import InputError
from sgfx.files import files
from sgfx.training import run_folder, running
from sgfx.training.run_folder import read_plain
from tests.sgfx.test_training import same_weights
from tests.tools.fresh_processes import start
from tests.tools.interrupted_training import (
    BATCH,
    OPTIONS,
    VALIDATION,
    Mixing,
    Noisy,
    follow,
    follow_to_the_end,
    kept_in,
    loader,
    network,
    train,
)


class Cut(BaseException):
    """Ends training from inside."""


def cut(monkeypatch, files, folder, **options):
    """Train, and raise `Cut` in place of writing one file too many; what was written stays, as after SIGKILL."""
    written = []
    write = run_folder.replacing

    def replacing(path):
        if len(written) == files:
            raise Cut
        written.append(path)
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "replacing", replacing)
        with pytest.raises(Cut):
            train(folder, **options)
    return [path.name for path in written]


def test_wherever_it_is_cut_the_weights_are_the_same(tmp_path, monkeypatch):
    whole, trainer, history = train(tmp_path / "whole", checkpoint_steps=2)
    assert len(history.epochs) == 2
    for count in (0, 1, 3, 4, 6, 8):  # checkpoints are made after steps 2, 4, 5, 6, 8 and 10, and logs between
        folder = tmp_path / str(count)
        cut(monkeypatch, count, folder, checkpoint_steps=2)
        again, resumed, records = train(folder, checkpoint_steps=2, resume=True)
        assert same_weights(whole, again), count
        assert same_weights(trainer.averaged, resumed.averaged)
        assert records == history
        assert (folder / "log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()
        best, other = (torch.load(path / "best.pt", weights_only=True) for path in (folder, tmp_path / "whole"))
        assert str(best) == str(other)


def test_a_folder_changes_nothing(tmp_path):
    assert same_weights(train(tmp_path, checkpoint_steps=1)[0], train(None)[0])


def test_the_schedule_goes_on(tmp_path, monkeypatch):
    options = {"epochs": 4, "warmup": 1, "schedule": (2, 3)}
    _, _, history = train(tmp_path / "whole", **options)
    assert [record.lr for record in history.epochs] == pytest.approx([0.025, 0.05, 0.005, 0.0005])
    cut(monkeypatch, 3, tmp_path / "cut", **options)
    assert train(tmp_path / "cut", resume=True, **options)[2] == history


def test_with_workers_that_draw(tmp_path, monkeypatch):
    options = {"data": loader(workers=1), "checkpoint_steps": 1}
    whole, _, history = train(tmp_path / "whole", **options)
    cut(monkeypatch, 2, tmp_path / "cut", **options)
    again, _, records = train(tmp_path / "cut", resume=True, **options)
    assert same_weights(whole, again)
    assert records == history


def test_what_is_no_loader_goes_on_by_epoch(tmp_path, monkeypatch):
    class Own:
        def __iter__(self):
            return iter(loader())

    whole, _, _ = train(tmp_path / "whole", data=Own(), checkpoint_steps=1)
    written = cut(monkeypatch, 4, tmp_path / "cut", data=Own(), checkpoint_steps=1)
    assert written[:3] == ["best.pt", "log.csv", "last.pt"]  # no checkpoint in the middle of an epoch
    assert same_weights(train(tmp_path / "cut", data=Own(), checkpoint_steps=1, resume=True)[0], whole)


def test_a_run_that_is_over_gives_its_weights_and_history(tmp_path):
    model, _, history = train(tmp_path)
    again, _, records = train(tmp_path, resume=True)
    assert same_weights(model, again)
    assert records == history


def test_a_process_that_is_killed_three_times_in_a_recipe(tmp_path):
    """In the middle of either pruning step, and of the training after them; where exactly is left to chance."""
    expected = follow(None)
    for phase in ("local-01", "local-02", "global"):
        process = start(follow_to_the_end, tmp_path, output=tmp_path / "said")
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / phase / "last.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    outcome = follow(tmp_path / "run", resume=True)
    assert same_weights(expected.model, outcome.model)
    assert (outcome.steps, outcome.history) == (expected.steps, expected.history)
    assert same_weights(expected.model, sgfx.load(tmp_path / "run/final.safetensors", into=network()))
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["local", "1"]] * 2 + [["local", "2"]] * 2 + [
        ["global", ""]
    ] * 2


@pytest.mark.parametrize(
    "number", [("pruner.pt", 2), ("last.pt", 7), ("generators.pt", 1), ("compressed.safetensors", 1), ("last.pt", 13)]
)
def test_a_recipe_that_is_cut_between_two_phases(tmp_path, monkeypatch, finished, number):
    """Where a phase begins anew, what the data have drawn before must not be drawn again."""
    name, times = number
    written = []
    write = run_folder.replacing

    def replacing(path):
        written.append(Path(path).name)
        if written.count(name) == times and written[-1] == name:
            raise Cut
        return write(path)

    with monkeypatch.context() as patch:
        for module in (run_folder, running, files):
            patch.setattr(module, "replacing", replacing)
        with pytest.raises(Cut):
            follow(tmp_path, resume=True)
    follow(tmp_path, resume=True)
    assert kept_in(tmp_path) == finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    follow(folder, resume=True)
    return kept_in(folder)


# What is refused


def other(folder, model=None, **options):
    given = {"epochs": 2, "lr": 0.05, "schedule": "cosine", "transform": Mixing(), **OPTIONS, **options}
    data = given.pop("data", None) or loader()
    return sgfx.Trainer(model or network(), data, VALIDATION, folder=folder, progress=False, **{"resume": True} | given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


def wider():
    model = network()
    model[3] = nn.Conv2d(8, 16, 3)
    return model


def lowered(ratio=0.5):
    return sgfx.compile(network(), groups=2, ratio=ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": False}, "holds a run already: go on with resume=True, or give another folder"),
        ({"lr": 0.1}, r"last.pt was made with other options: lr \(0.05 in the file, 0.1 here\)"),
        ({"ema": None}, r"ema \(0.9 in the file, None here\)"),
        ({"optimizer": torch.optim.AdamW}, r"optimizer \(None in the file, 'AdamW' here\)"),
        ({"data": DataLoader(Noisy(), 4, shuffle=True)}, r"batches \(5 in the file, 10 here\)"),
        ({"model": wider()}, r"another model: '3.bias' is torch.float32 \[8\] in the file and torch.float32 \[16\] in"),
        ({"model": network().double()}, r"'0.bias' is torch.float32 \[8\] in the file and torch.float64 \[8\] in Seq"),
        ({"model": lowered()}, r"'3._extra_state' is not there in the file and .* in Sequential .*or compiled"),
    ],
)
def test_the_checkpoint_of_another_run(run, options, message):
    trainer = other(run, **options)
    before, kept = copy.deepcopy(trainer.model), (run / "last.pt").read_bytes()
    with pytest.raises(InputError, match=message):
        trainer.fit()
    assert same_weights(before, trainer.model)
    assert (run / "last.pt").read_bytes() == kept


def test_the_checkpoint_of_another_structure(tmp_path):
    other(tmp_path, lowered(), resume=False).fit()
    assert sgfx.load(tmp_path / "last.pt", into=network())[3].weight.shape == lowered()[3].weight.shape
    other(tmp_path, lowered()).fit()
    with pytest.raises(InputError, match="another structure: layer '3' is grouped or masked otherwise than here"):
        other(tmp_path, lowered(0.6)).fit()
    masked = sgfx.Pruner(network(), groups=2, ratio=0.5, step=0.5)
    with pytest.raises(InputError, match="another structure: layer '3' is grouped or masked otherwise"):
        other(tmp_path, masked.model).fit()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "last.pt is damaged, or no checkpoint"),
        (b"PK\x03\x04 no archive", "last.pt is damaged, or no checkpoint"),
        ({"model": {}}, "last.pt is no checkpoint that sgfx wrote"),
        ({"sgfx": "checkpoint", "format": 99}, r"written by a newer sgfx \(format 99; this one reads 1\)"),
        ({"sgfx": "checkpoint", "format": 1, "model": {}}, "is damaged: it lacks model_ema, optimizer"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    file = tmp_path / "last.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match=message):
        other(tmp_path).fit()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="run is a file; give the path of a folder"):
        other(tmp_path / "run").fit()


def test_workers_that_outlive_an_epoch(tmp_path):
    data = DataLoader(Noisy(), BATCH, num_workers=1, persistent_workers=True)
    with pytest.raises(InputError, match=r"outlive an epoch \(persistent_workers=True\), with random states"):
        other(tmp_path, data=data)


def test_other_generators_than_before(run):
    data = DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator())
    with pytest.raises(InputError, match=r"train_data had generators \['.dataset.own'\].* and has .*generator'.* now"):
        other(run, data=data).fit()


def test_an_optimizer_whose_state_is_more_than_data(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["why"] = Mixing()

    with pytest.raises(InputError, match=r"last.pt would hold more than tensors and plain data .*Mixing.: the state"):
        other(tmp_path, optimizer=partial(Odd, momentum=0.9), resume=False).fit()
    assert not (tmp_path / "last.pt").exists()


# What stays whole


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole, _, _ = train(tmp_path / "whole", checkpoint_steps=1)
    folder = tmp_path / "cut"
    writes = []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"cut.last.pt can't be written: No space left on device") as caught:
            train(folder, checkpoint_steps=1)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == ["last.pt"]
    assert same_weights(train(folder, checkpoint_steps=1, resume=True)[0], whole)


def test_what_a_killed_process_left_half_written_is_taken_away(tmp_path):
    train(tmp_path)
    left = tmp_path / f".{'0' * 32}.pt"
    left.write_bytes(b"half")
    train(tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "log.csv"]


def poisoned(monkeypatch, calls, value):
    """Let the nth batch be of this value."""
    draw, left = Mixing.__call__, [calls]

    def mixed(self, inputs, targets):
        left[0] -= 1
        inputs, targets = draw(self, inputs, targets)
        return (inputs if left[0] else torch.full_like(inputs, value)), targets

    monkeypatch.setattr(Mixing, "__call__", mixed)


def test_a_loss_of_nan_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, 8, math.nan)
    with pytest.raises(
        FloatingPointError, match=r"became nan in step 3 of epoch 2; .*last.pt \(epoch 2, after 0 batches"
    ):
        train(tmp_path)
    assert read_plain(tmp_path / "last.pt", "checkpoint")["position"]["steps"] == 5
    monkeypatch.undo()
    assert same_weights(train(tmp_path, resume=True)[0], train(None)[0])


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path):
    class Exploding(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            self.steps += 1
            if self.steps == 4:
                self.param_groups[0]["params"][0].data[:] = math.inf

    trainer = other(tmp_path, optimizer=Exploding, resume=False, checkpoint_steps=1)
    with pytest.raises(FloatingPointError, match=r"weights became NaN or infinite in step 4.*after 3 batches of it"):
        trainer.fit()
    assert read_plain(tmp_path / "last.pt", "checkpoint")["position"]["steps"] == 3


def test_ctrl_c_says_where_it_goes_on(tmp_path, monkeypatch):
    def stop(self, inputs, targets):
        raise KeyboardInterrupt

    train(tmp_path / "run", epochs=1, schedule="constant")
    monkeypatch.setattr(Mixing, "__call__", stop)
    folder = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt) as caught:
        train(folder)
    assert not hasattr(caught.value, "__notes__")  # there is nothing to go on from
    monkeypatch.undo()
    cut(monkeypatch, 3, folder)
    monkeypatch.setattr(Mixing, "__call__", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(folder, resume=True)
    assert (
        "other/last.pt (epoch 2, after 0 batches of it, 5 steps in all); resume=True goes on"
        in caught.value.__notes__[0]
    )


def test_best_weights_are_those_of_the_best_epoch(tmp_path):
    model, _, history = train(tmp_path, epochs=5, ema=None, lr=0.3, schedule="constant")
    results = [record.val_top1 for record in history.epochs]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + results.index(max(results))
    model.load_state_dict(best["model"])
    images, targets = VALIDATION[0]
    assert (model.eval()(images).argmax(1) == targets).float().mean().item() == pytest.approx(max(results))
