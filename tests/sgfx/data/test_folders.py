"""Which folders are data sets, and what is said of those that are not."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from passes.errors import InputError
from sgfx.data.images import Files, Pixels
from sgfx.data.loaders import Loaders
from sgfx.data.sources import open_data


@pytest.mark.parametrize("validation", ["val", "test"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_folders_of_classes_are_read_in_order(make_folder, validation, suffix):
    data = open_data(str(make_folder({"train": 2, validation: 1}, suffix=suffix)))
    assert data.classes == ("ant", "bee", "cat")
    assert isinstance(data.train, Pixels)
    assert data.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 40, 41, 80, 81]
    assert data.train.images.dtype == torch.uint8
    assert data.val.targets.tolist() == [0, 1, 2]


def test_larger_images_stay_in_their_files(make_folder):
    data = open_data(str(make_folder({"train": 2, "val": 1}, size=(80, 70))))
    assert isinstance(data.train, Files)
    batch = next(iter(Loaders(data, size=24, batch_size=3).train))
    assert batch[0].shape == (3, 3, 24, 24)
    assert batch[0].dtype == torch.uint8
    inputs, targets = next(iter(Loaders(data, size=24, batch_size=3).val))
    assert targets.tolist() == [0, 1, 2]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = [[(value / 255 - m) / s for m, s in zip(mean, std, strict=True)] for value in (0, 40, 80)]
    assert torch.allclose(inputs[:, :, 12, 12], torch.tensor(expected), atol=1e-6)


def test_classes_of_validation_have_the_numbers_of_training(make_folder):
    root = make_folder({"train": 1, "val": 1})
    shutil.rmtree(root / "val" / "ant")
    assert open_data(str(root)).val.targets.tolist() == [1, 2]


def test_validation_alone_will_do_to_evaluate(make_folder):
    data = open_data(str(make_folder({"val": 1})))
    assert data.train is None
    with pytest.raises(InputError, match="has no training images: expected a folder train in it"):
        _ = Loaders(data).train


def test_cifar10_in_folders_is_normalised_as_cifar10(make_folder):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert open_data(str(make_folder({"test": 1}, classes=names))).normalization.mean[0] == 0.4914


def make_cub(root, split="1 1\n2 0\n3 1\n4 0\n"):
    names = ["001.Albatross/a.jpg", "001.Albatross/b.jpg", "002.Auklet/c.jpg", "002.Auklet/d.jpg"]
    for number, name in enumerate(names):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 50 * number, dtype=np.uint8)).save(root / "images" / name)
    (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (root / "train_test_split.txt").write_text(split)
    return root


def test_cub_is_read_as_it_is_published(tmp_path):
    data = open_data(str(make_cub(tmp_path)))
    assert data.classes == ("001.Albatross", "002.Auklet")
    assert data.train.targets.tolist() == [0, 1]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 100]
    assert data.val.images[:, 0, 0, 0].tolist() == [50, 150]


@pytest.mark.parametrize(
    ("split", "message"),
    [("1 1\n2 0\n", "must have a line for each image"), ("1 1\n2 0\n3\n4 0\n", "a line must be a number and what")],
)
def test_cub_with_lists_that_do_not_fit_is_refused(tmp_path, split, message):
    with pytest.raises(InputError, match=message):
        open_data(str(make_cub(tmp_path, split)))


def test_what_is_no_data_set_is_refused(make_folder, tmp_path):
    root = make_folder({"train": 1, "val": 1}, name="here/images")
    with pytest.raises(InputError, match=r"nowhere does not exist .*digits"):
        open_data(str(tmp_path / "nowhere"))
    (tmp_path / "images.zip").touch()
    with pytest.raises(InputError, match="is a file: unpack it"):
        open_data(str(tmp_path / "images.zip"))
    with pytest.raises(InputError, match=r"has no folder val or test; did you mean .*images\?"):
        open_data(str(tmp_path / "here"))
    with pytest.raises(InputError, match=r"has no folder val or test \(its folders: ant, bee, cat\)"):
        open_data(str(root / "val"))


def test_empty_folders_are_refused(make_folder):
    root = make_folder({"train": 1, "val": 1})
    for kind in ("ant", "bee", "cat"):
        (root / "val" / kind / "0.png").unlink()
    with pytest.raises(InputError, match="val has no images in its folders"):
        open_data(str(root))
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(InputError, match="train must have a folder of images for each class"):
        open_data(str(root))


def test_classes_that_training_lacks_are_refused(make_folder):
    root = make_folder({"train": 1, "val": 1})
    shutil.rmtree(root / "train" / "bee")
    with pytest.raises(InputError, match=r"has classes that .*train does not: bee"):
        open_data(str(root))


def test_cifar_that_is_not_there_is_not_fetched(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"does not hold cifar10 whole .*download=cifar10 fetches it"):
        open_data(str(tmp_path))


def test_only_cifar_can_be_fetched(tmp_path):
    with pytest.raises(InputError, match="only cifar10 and cifar100 can be downloaded, not 'imagenet'"):
        open_data(str(tmp_path), download="imagenet")
