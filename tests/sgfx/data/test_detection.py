"""Images with boxes in COCO's format: what is read, moved and filtered, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sgfx
from sgfx.data.detection import DetectionLoaders, collate, examples, open_detection
from tests.tools.detection import images_with_boxes, write_coco


def changed(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_images_and_boxes_come_as_they_were_written(tmp_path):
    data = open_detection(write_coco(tmp_path, {"train": 3, "val": 3}))
    assert data.classes == ("kind1", "kind2")
    images, targets = images_with_boxes(3, seed=len("val"))
    ((found, boxes),) = DetectionLoaders(data, batch_size=3).val
    for image, wanted in zip(found, images, strict=True):
        assert image.dtype == torch.float32
        assert torch.allclose(image, wanted.clamp(0, 1), atol=1 / 255)
    for target, wanted in zip(boxes, targets, strict=True):
        assert torch.equal(target["boxes"], wanted["boxes"])
        assert torch.equal(target["labels"], wanted["labels"])
        assert type(target["boxes"]) is torch.Tensor
    assert boxes[2]["boxes"].shape == (0, 4)


def test_boxes_move_with_mirrored_images(tmp_path):
    data = open_detection(write_coco(tmp_path, {"train": 2, "val": 2}))
    torch.manual_seed(0)
    seen = [examples(data.train, train=True)[0] for _ in range(8)]
    plain, target = examples(data.train, train=False)[0]
    mirrored = [torch.equal(image, plain.flip(-1)) for image, _ in seen]
    assert {True, False} == set(mirrored)
    x1, y1, x2, y2 = target["boxes"][0].tolist()
    for is_mirrored, (image, each) in zip(mirrored, seen, strict=True):
        width = image.shape[-1]
        wanted = [width - x2, y1, width - x1, y2] if is_mirrored else [x1, y1, x2, y2]
        assert each["boxes"][0].tolist() == wanted


def test_labels_are_numbered_on_over_holes(tmp_path):
    data = open_detection(write_coco(tmp_path, {"train": 3, "val": 3}, ids=(3, 90)))
    assert data.classes == ("kind3", "kind90")
    labels = [target["labels"].tolist() for _, target in map(examples(data.val, train=False).__getitem__, range(3))]
    assert labels == [[1], [2], []]


def test_boxes_are_clipped_or_left_out_and_counted(tmp_path):
    root = write_coco(tmp_path, {"train": 2, "val": 2})
    width = json.loads((root / "train.json").read_text())["images"][0]["width"]
    boxes = [
        ([-4, 2, 10, 5], [0, 2, 6, 7]),
        ([3, 4, 1, 1], [3, 4, 4, 5]),  # one pixel
        ([width - 2, 0, 9, 3], [width - 2, 0, width, 3]),
        ([width, 0, 5, 5], None),
        ([5, 5, 0, 3], None),
        ([5, 5, 3, -1], None),
    ]

    def add(content):
        content["annotations"] = [
            {"id": number, "image_id": 0, "category_id": 1, "bbox": box} for number, (box, _) in enumerate(boxes)
        ]

    changed(root / "train.json", add)
    with pytest.warns(UserWarning, match=r"3 boxes of .*train.json lie outside their images, or have no area"):
        data = open_detection(root)
    assert data.train.filtered == 3
    _, target = examples(data.train, train=False)[0]
    assert target["boxes"].tolist() == [wanted for _, wanted in boxes if wanted is not None]


def test_crowds_are_left_out_of_training_alone(tmp_path):
    root = write_coco(tmp_path, {"train": 2, "val": 2})
    for part in ("train", "val"):
        changed(root / f"{part}.json", lambda content: content["annotations"][0].update(iscrowd=1))
    data = open_detection(root)
    assert len(examples(data.train, train=True)[0][1]["labels"]) == 0
    assert examples(data.val, train=False)[0][1]["iscrowd"].tolist() == [1]


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("{}.json", "{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_other_layouts(tmp_path, annotations, images):
    root = write_coco(tmp_path / "plain", {"train": 2, "val": 2})
    other = tmp_path / "other"
    for part in ("train", "val"):
        (other / images.format(part)).mkdir(parents=True)
        for file in (root / "images").glob(f"{part}*"):
            file.rename(other / images.format(part) / file.name)
        (other / annotations.format(part)).parent.mkdir(exist_ok=True)
        (root / f"{part}.json").rename(other / annotations.format(part))
    data = open_detection(other)
    assert len(data.train.images) == len(data.val.images) == 2
    assert len(DetectionLoaders(data).unlabelled(2)[0]) == 2


@pytest.mark.parametrize(
    ("mode", "pixels", "wanted"),
    [
        ("L", np.full((8, 9), 100, np.uint8), 100),
        ("I;16", np.full((8, 9), 100 * 257, np.uint16), 100),
        ("I", np.full((8, 9), 65535, np.int32), 255),
    ],
)
def test_grey_and_16_bit_images(tmp_path, mode, pixels, wanted):
    root = write_coco(tmp_path, {"train": 2, "val": 2}, suffix="tiff")
    image = Image.fromarray(pixels)
    assert image.mode == mode
    image.save(root / "images" / "val0.tiff")
    changed(root / "val.json", lambda content: content["images"][0].update(width=9, height=8))
    found, _ = examples(open_detection(root).val, train=False)[0]
    assert found.shape == (3, 8, 9)
    assert torch.equal((255 * found).round(), torch.full_like(found, wanted))


def test_unlabelled_images_are_always_the_same(tmp_path):
    loaders = DetectionLoaders(open_detection(write_coco(tmp_path, {"train": 5, "val": 2})), batch_size=2)
    once, again = loaders.unlabelled(3), loaders.unlabelled(3)
    assert [len(batch) for batch in once] == [2, 1]
    for one, two in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    with pytest.raises(sgfx.InputError, match="has 5 training images: 6 can't be taken"):
        loaders.unlabelled(6)


def test_a_batch_is_two_lists():
    images, targets = images_with_boxes(2)
    assert collate(list(zip(images, targets, strict=True))) == (images, targets)


def drop(content, key):
    del content[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["images"][1].update(file_name="gone.png"),
            r"names 1 images of 2 that are not in .*images: gone.png",
        ),
        (lambda c: c["annotations"][0].update(category_id=7), "a box of category 7, which is not in its lists"),
        (lambda c: c["annotations"][0].update(image_id=7), "a box of image 7, which is not in its lists"),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"four numbers \[x, y, width, height\], not \[1, 2, 3\]",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "x"]), "a bbox is four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "a bbox is four numbers"),
        (lambda c: c["annotations"].clear(), "has no boxes for its 2 images"),
        (lambda c: c["images"].clear(), "has no images"),
        (lambda c: c["categories"].clear(), "has no categories"),
        (lambda c: c["images"][1].update(id=0), "ids of images must be whole numbers, each of one entry alone, not 0"),
        (lambda c: drop(c["images"][0], "width"), "every entry of images must have 'width'"),
        (lambda c: drop(c, "categories"), "must be an object with the lists images, annotations, categories"),
    ],
)
def test_annotations_that_are_refused(tmp_path, change, message):
    root = write_coco(tmp_path, {"train": 2, "val": 2})
    changed(root / "val.json", change)
    with pytest.raises(sgfx.InputError, match=message):
        open_detection(root)


def test_folders_that_are_refused(tmp_path):
    root = write_coco(tmp_path / "data", {"train": 2, "val": 2})
    with pytest.raises(sgfx.InputError, match="does not exist"):
        open_detection(tmp_path / "nothing")
    with pytest.raises(sgfx.InputError, match=r"is a file: unpack it"):
        open_detection(root / "val.json")
    changed(root / "train.json", lambda content: content["categories"][0].update(name="other"))
    with pytest.raises(sgfx.InputError, match=r"has the categories other, kind2, and .* has kind1, kind2"):
        open_detection(root)
    (root / "train.json").unlink()
    loaders = DetectionLoaders(open_detection(root))
    with pytest.raises(sgfx.InputError, match="has no training images"):
        _ = loaders.train
    (root / "val.json").write_text("{")
    with pytest.raises(sgfx.InputError, match="is no JSON file, or a damaged one"):
        open_detection(root)
    (root / "val.json").unlink()
    with pytest.raises(sgfx.InputError, match=r"no annotations in COCO's format to validate on \(it holds images\)"):
        open_detection(root)


def test_images_that_are_not_what_was_annotated(tmp_path):
    root = write_coco(tmp_path, {"train": 2, "val": 2})
    changed(root / "val.json", lambda content: content["images"][0].update(width=7))
    with pytest.raises(sgfx.InputError, match=r"val0.png has \d+×\d+ pixels, and .*val.json says 7×\d+"):
        examples(open_detection(root).val, train=False)[0]
    (root / "images" / "val1.png").write_bytes(b"no image")
    with pytest.raises(sgfx.InputError, match=r"val1.png can't be read"):
        examples(open_detection(root).val, train=False)[1]


def test_batches_are_divided_among_processes(tmp_path, monkeypatch):
    data = open_detection(write_coco(tmp_path, {"train": 4, "val": 2}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert DetectionLoaders(data, batch_size=4).train.batch_size == 2
    with pytest.raises(sgfx.InputError, match="batch_size=3 can't be divided among 2 processes"):
        DetectionLoaders(data, batch_size=3)
