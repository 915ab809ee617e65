"""The trainer on detectors: losses, precision, checkpoints, averages, processes, and what is refused."""

import csv
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import detection

import sgfx
from sgfx.training.tasks.detection import class_labels
from tests.sgfx.test_training import same_weights
from tests.sgfx.test_training_processes import launch
from tests.tools.detection import (
    images_with_boxes,
    loader,
    measured,
    tiny_detector,
    train_as_one_of_several,
)

LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
train = partial(sgfx.Trainer, lr=0.02, epochs=2, task="detection", progress=False)


def found(model):
    """What a model finds, with scores that are no matter of chance."""
    with torch.no_grad():
        return model.eval()(images_with_boxes(2)[0])


def test_losses_are_summed_and_logged_one_by_one(tmp_path):
    small = tiny_detector()
    small.backbone = sgfx.compile(small.backbone, groups=4, ratio=0.5)
    history = train(small, loader(4), loader(3), folder=tmp_path).fit()
    for record in history.epochs:
        assert record.losses.keys() == LOSSES
        assert record.loss == pytest.approx(sum(record.losses.values()))
        assert record.train == {}
        assert record.val.keys() == {"map", "map50", "map75"}
    assert history.epochs[1].loss < history.epochs[0].loss
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [float(row["loss_objectness"]) for row in rows] == [
        each.losses["loss_objectness"] for each in history.epochs
    ]
    assert {"val_map", "val_map50"} <= rows[0].keys()
    assert len(sgfx.plans(small)) == len(sgfx.plans(tiny_detector_compiled()))


def tiny_detector_compiled():
    small = tiny_detector()
    small.backbone = sgfx.compile(small.backbone, groups=4, ratio=0.5)
    return small


def test_a_step_is_one_of_the_sum_of_the_models_own_losses():
    batch = images_with_boxes(3)
    options = {"rpn_batch_size_per_image": 100_000, "box_batch_size_per_image": 10_000}  # nothing is drawn at random
    one, other = tiny_detector(**options), tiny_detector(**options)
    history = train(one, [batch], epochs=1, momentum=0.0, weight_decay=0.0).fit()
    losses = other.train()(*batch)
    sum(losses.values()).backward()
    for parameter in other.parameters():
        parameter.data -= 0.02 * parameter.grad
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name
    assert history.epochs[0].losses == pytest.approx({name: loss.item() for name, loss in losses.items()}, rel=1e-5)


def test_precision_is_that_of_the_averages_after_the_epoch(tmp_path):
    detector = tiny_detector(box_score_thresh=0.0)
    trainer = train(detector, loader(4), loader(4), ema=0.5, folder=tmp_path)
    record = trainer.fit().epochs[-1]
    assert dict(record.val) == measured(trainer.averaged, loader(4))
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["val_map"] == max(
        float(row["val_map"]) for row in csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    )


class Cut(BaseException):
    """Ends training from inside."""


def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path):
    def cut_after(batches):
        def transform(images, targets):
            nonlocal batches
            batches -= 1
            if not batches:
                raise Cut
            return images, targets

        return transform

    options = {"checkpoint_steps": 1, "ema": 0.9}
    whole = tiny_detector()
    history = train(
        whole, loader(4, shuffle=True), loader(2), transform=cut_after(99), **options, folder=tmp_path / "a"
    )
    history = history.fit()
    with pytest.raises(Cut):
        train(
            tiny_detector(),
            loader(4, shuffle=True),
            loader(2),
            transform=cut_after(4),
            **options,
            folder=tmp_path / "b",
        ).fit()
    again = tiny_detector()
    resumed = train(
        again,
        loader(4, shuffle=True),
        loader(2),
        transform=cut_after(99),
        **options,
        folder=tmp_path / "b",
        resume=True,
    ).fit()
    assert resumed == history
    assert same_weights(whole, again)


def test_two_processes_train_one_detector_and_count_each_image_once(tmp_path):
    assert launch(train_as_one_of_several, tmp_path) == [0, 0], (tmp_path / "0.err").read_text()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first["model"][name], value) for name, value in second["model"].items())
    again = tiny_detector()
    again.load_state_dict(first["model"])
    assert first["row"]["val"] == measured(again, loader(5, 1))
    assert first["row"]["losses"].keys() == LOSSES


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_other_detectors_say_which_labels_they_know(name):
    with torch.device("meta"):
        made = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3)
    assert class_labels(made) == (range(1, 3) if name.startswith("ssd") else range(3))
    assert class_labels(tiny_detector()) == range(1, 3)
    assert class_labels(nn.Linear(1, 1)) is None


def broken(change):
    images, targets = images_with_boxes(2)
    change(images, targets)
    return [(images, targets)]


def bytes_first(images, _):
    images[0] = torch.zeros(3, 9, 9).byte()


def put(index, **values):
    return broken(lambda _, targets: targets[index].update(values))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(lambda _, targets: targets.pop()), r"train_data must give batches \(images, targets\): .* collate_fn="),
        ([torch.zeros(2, 3, 8, 8)], r"must give batches \(images, targets\)"),
        (broken(bytes_first), r"image 0 in batch 1 .* is torch.uint8"),
        (broken(lambda _, targets: targets[0].pop("labels")), "must be a dict with the tensors 'boxes' and 'labels'"),
        (put(0, boxes=torch.zeros(4)), r"are needed for image 0 .* and are \[4\] and \[1\]: without boxes, give"),
        (put(0, labels=torch.tensor([1.0])), "not torch.float32 and torch.float32"),
        (put(0, boxes=torch.tensor([[3.0, 3, 3, 9]])), r"\[3.0, 3.0, 3.0, 9.0\] is one for image 0"),
        (put(0, boxes=torch.tensor([[3.0, 3, torch.nan, 9]])), r"\[3.0, 3.0, nan, 9.0\] is one"),
        (put(0, labels=torch.tensor([3])), r"labels go from 3 to 3, and FasterRCNN knows 1 to 2: .*num_classes=4"),
        (put(0, labels=torch.tensor([0])), "labels go from 0 to 0, and FasterRCNN knows 1 to 2"),
    ],
)  # fmt: skip
def test_data_that_are_refused(data, message):
    detector = tiny_detector()
    with pytest.raises(sgfx.InputError, match=message):
        train(detector, data).fit()
    assert same_weights(detector, tiny_detector())


class Lossless(nn.Module):
    """Boxes in both modes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images, targets=None):
        one = {"boxes": torch.zeros(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1) * self.scale}
        return [one for _ in images]


def test_models_and_options_that_are_refused(monkeypatch):
    batches = [images_with_boxes(2)]
    with pytest.raises(sgfx.InputError, match=r"a detector must give a dict of losses, .* Lossless gave list"):
        train(Lossless(), batches).fit()
    with pytest.raises(
        sgfx.InputError, match=r"models that take a list of images and give boxes, .* Sequential does not"
    ):
        train(nn.Sequential(nn.Conv2d(3, 4, 3)), batches).fit()
    with pytest.raises(sgfx.InputError, match="label_smoothing is of task='classification'"):
        train(tiny_detector(), batches, label_smoothing=0.1)
    with pytest.raises(sgfx.InputError, match=r"teacher is of task='classification', .*: sgfx.distill trains towards"):
        train(tiny_detector(), batches, teacher=tiny_detector())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sgfx.InputError, match="mean average precision needs faster-coco-eval"):
        train(tiny_detector(), batches, batches)
