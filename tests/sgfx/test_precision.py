"""Average precision of boxes, against pycocotools and by hand."""

import contextlib
import io

import pytest
import torch

import sgfx
from sgfx.training.tasks.precision import PrecisionMeter, average_precision


def boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=generator)], 1)


def random_images(count=12, labels=3):
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(count):
        true = boxes(5, generator)
        kinds = torch.randint(1, labels + 1, (5,), generator=generator)
        moved = true + torch.randn(5, 4, generator=generator)
        found = torch.cat([moved, boxes(4, generator)])
        wrong = torch.randint(1, labels + 1, (4,), generator=generator)
        crowd = (torch.rand(5, generator=generator) < 0.1).long()
        images.append(
            {
                "found": {
                    "boxes": found,
                    "scores": torch.rand(9, generator=generator),
                    "labels": torch.cat([kinds, wrong]),
                },
                "true": {"boxes": true, "labels": kinds, "iscrowd": crowd},
            }
        )
    images.append(
        {
            "found": {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()},
            "true": {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},
        }
    )
    return images


def oracle(images, labels):
    """What pycocotools finds, in its own words."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(part):
        for number, image in enumerate(images):
            each = image[part]
            for row, label in enumerate(each["labels"].tolist()):
                x1, y1, x2, y2 = each["boxes"][row].double().tolist()
                box = {"image_id": number, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                box |= {"area": (x2 - x1) * (y2 - y1), "iscrowd": int(each.get("iscrowd", torch.zeros(9))[row])}
                yield box | ({"score": each["scores"][row].item()} if part == "found" else {})

    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = {
            "images": [{"id": number} for number in range(len(images))],
            "annotations": [{"id": number, **each} for number, each in enumerate(entries("true"), 1)],
            "categories": [{"id": label} for label in range(1, labels + 1)],
        }
        true.createIndex()
        found = COCOeval(true, true.loadRes(list(entries("found"))), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    per_class = [found.eval["precision"][:, :, k, 0, -1].mean() for k in range(labels)]
    return found.stats[:3].tolist(), per_class


def test_it_is_what_pycocotools_finds():
    pytest.importorskip("pycocotools")
    images = random_images()
    total, by_label = average_precision(images)
    wanted, per_class = oracle(images, 3)
    assert list(total) == ["map", "map50", "map75"]
    assert list(total.values()) == pytest.approx(wanted, abs=1e-6)
    assert list(by_label) == [1, 2, 3]
    assert list(by_label.values()) == pytest.approx(per_class, abs=1e-6)
    assert 0.1 < total["map"] < 0.9


def test_by_hand():
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    near = torch.tensor([[10.0, 10.0, 20.0, 16.2]])  # an IoU of 0.62: right at 3 of the 10 thresholds
    true = {"boxes": box, "labels": torch.tensor([1])}
    found = {"boxes": near, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    total, by_label = average_precision([{"found": found, "true": true}])
    assert total == pytest.approx({"map": 0.3, "map50": 1.0, "map75": 0.0})
    assert by_label == pytest.approx({1: 0.3})


def test_a_meter_goes_on_from_its_state_and_joins_processes():
    images = random_images()
    whole, half, rest = PrecisionMeter(), PrecisionMeter(), PrecisionMeter()
    whole.update([image["found"] for image in images], [image["true"] for image in images])
    half.update([image["found"] for image in images[:5]], [image["true"] for image in images[:5]])
    rest.load_state(half.state())
    rest.update([image["found"] for image in images[5:]], [image["true"] for image in images[5:]])
    wanted = PrecisionMeter.results([whole.state()])
    assert PrecisionMeter.results([rest.state()]) == wanted
    other = PrecisionMeter()
    other.update([image["found"] for image in images[5:]], [image["true"] for image in images[5:]])
    assert PrecisionMeter.results([half.state(), other.state()]) == wanted
    whole.update(None, [image["true"] for image in images])  # in training a detector finds nothing
    assert PrecisionMeter.results([whole.state()]) == wanted
    assert PrecisionMeter.results([PrecisionMeter().state()]) == {}


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sgfx.InputError, match=r"needs faster-coco-eval: pip install 'sgfx\[detection\]'"):
        average_precision(random_images())
