"""What becomes of a batch: crops, flips, normalisation, mixing."""

import pytest
import torch
from torch.nn import functional as F

from passes.errors import InputError
from sgfx.data.augmentation import Augmentation, random_crop, random_flip
from sgfx.data.loaders import Loaders
from sgfx.data.normalization import NORMALIZATIONS, Normalization, normalization
from sgfx.data.sources import open_data


def every_crop(image, padding):
    """All crops of one image ``[C, H, W]``, by slicing."""
    padded, (height, width) = F.pad(image, (padding,) * 4), image.shape[1:]
    places = range(2 * padding + 1)
    return [padded[:, top : top + height, left : left + width] for top in places for left in places]


def test_crops_are_crops_and_all_of_them_come():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (2, 3, 6, 7), dtype=torch.uint8)
    crops = [every_crop(image, 1) for image in images]
    seen = [set(), set()]
    for _ in range(100):
        made = random_crop(images, 1)
        assert made.dtype == torch.uint8
        for image in range(2):
            places = [place for place, crop in enumerate(crops[image]) if torch.equal(crop, made[image])]
            assert len(places) == 1
            seen[image].update(places)
    assert seen == [set(range(9)), set(range(9))]


def test_images_of_a_batch_are_cropped_each_at_its_own_place():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (1, 1, 8, 8), dtype=torch.uint8).repeat(32, 1, 1, 1)
    assert len(random_crop(images).flatten(1).unique(dim=0)) > 20


def test_about_half_of_a_batch_is_mirrored():
    torch.manual_seed(0)
    images = torch.arange(6).view(1, 1, 2, 3).repeat(400, 1, 1, 1)
    made = random_flip(images)
    mirrored = (made == images.flip(-1)).flatten(1).all(1)
    assert (mirrored | (made == images).flatten(1).all(1)).all()
    assert 150 < mirrored.sum() < 250


def test_normalisation_by_hand():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert Normalization((0.5,), (0.25,))(images).flatten().tolist() == [-2.0, 2.0]
    assert normalization("cifar100") is NORMALIZATIONS["cifar100"]
    assert normalization(([0.1, 0.2], [0.3, 0.4])) == Normalization((0.1, 0.2), (0.3, 0.4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("imagnet", "unknown normalization 'imagnet'; choose imagenet, cifar10"),
        (([0.5], [0.0]), "deviations above 0"),
        (([0.5, 0.5], [1.0]), "one of each per channel"),
        (([], []), "one of each per channel"),
    ],
)
def test_normalisations_that_can_not_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        normalization(given)


def test_another_number_of_channels_is_refused():
    with pytest.raises(InputError, match="of 1 channels, and images have 3"):
        Normalization((0.5,), (0.5,))(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixing_gives_probabilities(options):
    augment = Augmentation(NORMALIZATIONS["half"], crop=True, flip=True, classes=5, **options)
    images, targets = augment(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    assert targets.shape == (4, 5)
    assert torch.allclose(targets.sum(1), torch.ones(4))


def test_parameters_below_zero_are_refused():
    with pytest.raises(InputError, match="mixup must be at least 0 and finite, not -1"):
        Augmentation(NORMALIZATIONS["half"], crop=False, flip=False, mixup=-1, cutmix=0)


def test_digits_are_not_mirrored():
    loaders = Loaders(open_data("digits", size=8))
    torch.manual_seed(0)
    images, targets = loaders.train.dataset.__getitems__(range(64))
    made, same = loaders.augmentation(images, targets)
    assert torch.equal(same, targets)
    assert targets.max() == 9
    inputs = NORMALIZATIONS["half"](F.pad(images, (4,) * 4))
    for image, whole in zip(made, inputs, strict=True):  # each is a crop of itself, as it stands
        assert any(torch.equal(image, whole[:, y : y + 8, x : x + 8]) for y in range(9) for x in range(9))


def test_unlabelled_images_are_always_the_same():
    data = open_data("synthetic", size=8)
    first, again = (torch.cat(Loaders(data).unlabelled(100)) for _ in range(2))
    assert first.shape == (100, 3, 8, 8)
    assert torch.equal(first, again)
    assert len(first.flatten(1).unique(dim=0)) == 100
    with pytest.raises(InputError, match="has 192 training images: 193 can't be taken"):
        Loaders(data).unlabelled(193)


def test_batches_are_shared_out_among_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    data = open_data("synthetic", size=8)
    assert Loaders(data, batch_size=48).train.batch_size == 16
    with pytest.raises(InputError, match="batch_size=64 can't be divided among 3 processes"):
        Loaders(data, batch_size=64)
