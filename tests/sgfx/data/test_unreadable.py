"""Images that can't be read are skipped and named, in memory and in files, in this process and in workers."""

import warnings

import pytest
import torch

from passes.errors import InputError
from sgfx.data.images import Files
from sgfx.data.loaders import Loaders
from sgfx.data.sources import open_data


def damage(root, *names):
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:40])


def test_small_images_are_left_out_when_they_are_read(make_folder):
    root = make_folder({"train": 3, "val": 1})
    damage(root, "train/ant/1.png", "train/cat/0.png")
    with pytest.warns(UserWarning, match=r"2 of 9 images of .*\(training\) can't be read.*ant/1.png, .*cat/0.png"):
        data = open_data(str(root))
    assert data.train.targets.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 2, 40, 41, 42, 81, 82]


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_left_out_of_their_batches_and_told_once(make_folder, workers):
    root = make_folder({"train": 3, "val": 2}, size=(80, 80))
    damage(root, "val/bee/0.png")
    loader = Loaders(open_data(str(root)), size=8, batch_size=4, workers=workers).val
    assert [targets.tolist() for _, targets in loader] == [[0, 0, 1], [2, 2]]
    with pytest.warns(UserWarning, match=r"1 of 6 images of .*\(validation\) can't be read and were skipped: .*bee/0"):
        loader.dataset.set_epoch(1)
    list(loader)
    with warnings.catch_warnings():
        loader.dataset.set_epoch(2)


def test_a_batch_never_is_empty(make_folder):
    root = make_folder({"train": 3, "val": 2}, size=(80, 80))
    damage(root, "val/ant/0.png", "val/ant/1.png")
    loader = Loaders(open_data(str(root)), size=8, batch_size=2).val
    assert [targets.tolist() for _, targets in loader] == [[1, 1], [1, 1], [2, 2]]


def test_batches_of_several_processes_keep_their_size(make_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    root = make_folder({"train": 3, "val": 2}, size=(80, 80))
    damage(root, "val/bee/0.png")
    loader = Loaders(open_data(str(root)), size=8, batch_size=12).val
    assert [targets.tolist() for _, targets in loader] == [[0, 0, 1, 1, 2, 2]]


def test_where_nothing_can_be_read_it_is_said(make_folder):
    root = make_folder({"train": 1, "val": 1}, size=(80, 80))
    damage(root, "val/ant/0.png", "val/bee/0.png", "val/cat/0.png")
    with pytest.raises(InputError, match=r"none of the 3 images of .* can be read"):
        open_data(str(root))
    files = Files([(str(root / "val/ant/0.png"), 0), (str(root / "val/bee/0.png"), 1)], "here")
    with pytest.raises(InputError, match="none of the 2 images of here can be read"):
        files.read([0], lambda image: image)


def test_memory_errors_are_no_damaged_images(make_folder, monkeypatch):
    root = make_folder({"train": 1, "val": 1})

    def exhausted(path):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", exhausted)
    with pytest.raises(MemoryError):
        open_data(str(root))


def test_training_epochs_go_on_past_them(make_folder):
    import models_zoo
    import sgfx

    root = make_folder({"train": 3, "val": 1}, size=(80, 80))
    damage(root, "train/bee/0.png")
    loaders = Loaders(open_data(str(root)), size=32, batch_size=4)
    torch.manual_seed(0)
    model = models_zoo.create("lenet5", in_channels=3, num_classes=3)
    trainer = sgfx.Trainer(model, loaders.train, epochs=2, lr=0.01, transform=loaders.augmentation, progress=False)
    with pytest.warns(UserWarning, match=r"1 of 9 images of .*\(training\) can't be read"):
        assert len(trainer.fit().epochs) == 2
