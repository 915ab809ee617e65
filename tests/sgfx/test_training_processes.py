"""Several processes, really started: the same weights as in one with as large a batch, and a run gone on with."""

from __future__ import annotations

import socket

import pytest
import torch

from tests.tools.fresh_processes import start
from tests.tools.interrupted_training import follow_as_one_of_several
from tests.tools.trained_in_processes import BATCH, main, train

PROCESSES = 2


def launch(function, folder, *given):
    """Start processes as torchrun does; returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": 0}
    started = [
        start(
            function, folder, *given, output=folder / str(rank),
            environment={**shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def close(one, other, tolerance):
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two processes that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert launch(main, folder, False, 0) == [0, 0], (folder / "0.err").read_text()
    return folder


def made_in(folder, rank):
    return torch.load(folder / f"weights-{rank}.pt", weights_only=True)


def test_two_processes_train_as_one_with_twice_the_batch(whole):
    alone, history = train(PROCESSES * BATCH)
    first, second = (made_in(whole, rank) for rank in range(PROCESSES))
    assert close(first["model"], second["model"], 0)
    assert close(first["model"], alone.state_dict(), 1e-5)
    for record, row in zip(history.epochs, first["rows"], strict=True):
        assert row["loss"] == pytest.approx(record.loss, abs=1e-5)
        assert (row["train"], row["val"]) == (dict(record.train), dict(record.val))  # no example counts twice


def test_they_leave_no_mark_and_the_main_one_alone_shows_bars(whole):
    assert [(whole / f"{rank}.out").read_text() for rank in range(PROCESSES)] == ["untouched"] * PROCESSES
    assert "train_data" in (whole / "0.err").read_text()
    assert "data" not in (whole / "1.err").read_text()


def test_two_processes_go_on_where_they_died(whole, tmp_path):
    assert launch(main, tmp_path, False, 5) == [9, 9]  # in the second batch of three of the second epoch
    assert launch(main, tmp_path, True, 0) == [0, 0], (tmp_path / "0.err").read_text()
    before, after = (made_in(folder, 1) for folder in (whole, tmp_path))
    assert close(before["model"], after["model"], 0)
    assert before["rows"] == after["rows"]
    assert (whole / "run/log.csv").read_text() == (tmp_path / "run/log.csv").read_text()


def test_two_processes_follow_a_recipe_together(tmp_path):
    """With norms and dropout: each has drawn for itself, and both have the same weights and statistics in the end."""
    assert launch(follow_as_one_of_several, tmp_path) == [0, 0], (tmp_path / "0.err").read_text()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES))
    assert any("running_mean" in name for name in first)
    assert close(first, second, 0)
