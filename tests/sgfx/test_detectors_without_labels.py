"""Detectors are calibrated, distilled and given budgets on images of any sizes, without labels."""

import copy

import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import sgfx
from passes.calibration.budget.judging import held_out_error
from passes.calibration.data import read_examples
from passes.calibration.output_distance import distance
from sgfx.reporting.counting import count_macs
from sgfx.training.detector_teacher import PROPOSALS, DetectorTeacher
from sgfx.training.drawing import Examples
from tests.sgfx.test_training import same_weights
from tests.tools.detection import images_with_boxes, tiny_detector

pytestmark = pytest.mark.filterwarnings("ignore:not calibrated, since they read nothing")  # what decides at the end


@pytest.fixture(scope="module")
def dense():
    return tiny_detector()


@pytest.fixture(scope="module")
def small(dense):
    return sgfx.compile(dense, groups=4, ratio=0.5, example_inputs=images_with_boxes(2))


@pytest.fixture(scope="module")
def lists():
    return [images_with_boxes(4, seed=seed)[0] for seed in range(4)]


def retinanet():
    """A detector of one stage."""
    backbone = tiny_detector().backbone
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    made = RetinaNet(backbone, 3, anchor_generator=anchors, min_size=32, max_size=48).eval()
    for module in made.head.modules():
        if isinstance(module, torch.nn.Conv2d):  # torchvision begins with next to nothing
            torch.nn.init.kaiming_normal_(module.weight)
    return made


def apart(one, other):
    """How far the maps of two detectors are from each other, on images that were not seen."""
    with torch.no_grad():
        images = one.transform(images_with_boxes(4, seed=9)[0])[0].tensors
        return distance(other.backbone.eval()(images), one.backbone.eval()(images)).item()


def test_data_come_in_many_forms_and_are_the_same_lists(dense):
    images, targets = images_with_boxes(3)
    alike = [images[0]] * 3
    for data in ([images], [(images, targets)], [(tuple(images), tuple(targets))], list(images), iter([images])):
        found = [image for (given,) in read_examples(data, "data", dense) for image in given]
        assert all(torch.equal(x, y) for x, y in zip(found, images, strict=True))
    for data in (
        torch.stack(alike),
        [torch.stack(alike)],
        [(torch.stack(alike), targets)],
        [(alike[0], targets[0])] * 3,
    ):
        found = [image for (given,) in read_examples(data, "data", dense) for image in given]
        assert all(torch.equal(x, y) for x, y in zip(found, alike, strict=True))
    assert [len(given) for (given,) in read_examples([images * 3], "data", dense)] == [8, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"images": 1}], "takes lists of images .* batch 1 of data is a dict of something else"),
        ([[torch.zeros(2, 2)]], "batch 1 of data is a list of something else"),
        ([[torch.zeros(3, 8, 8).byte()]], "has an image of torch.uint8: give numbers in"),
        ([[torch.full((3, 8, 8), torch.nan)]], "batch 1 of data holds NaN or infinite values"),
        ([], "data gave no examples"),
        ([[]], "data gave no examples"),
    ],
)
def test_data_that_are_refused(dense, small, data, message):
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.calibrate(dense, small, data)
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.distill(dense, small, data, steps=1)


def test_calibration_brings_the_maps_nearer(dense, small, lists):
    calibrated = sgfx.calibrate(dense, copy.deepcopy(small), lists)
    assert apart(dense, calibrated) < 0.2 * apart(dense, small)


def test_the_teacher_compares_maps_and_heads_at_its_own_places(dense, small):
    images, _ = images_with_boxes(3)
    teacher = DetectorTeacher(dense)
    outputs, loss = teacher.lesson(small, (images,), lambda: None)
    maps, (objectness, corrections), (scores, boxes) = outputs
    with torch.no_grad():
        resized, _ = dense.transform(images)
        proposals = [each[:PROPOSALS] for each in dense.rpn(resized, dense.backbone(resized.tensors))[0]]
        own = small.backbone(resized.tensors)
        heads = small.rpn.head(list(own.values()))
        pooled = small.roi_heads.box_roi_pool(own, proposals, resized.image_sizes)
        wanted = small.roi_heads.box_predictor(small.roi_heads.box_head(pooled))
    assert all(torch.equal(maps[key], own[key]) for key in own)
    for found, expected in zip((*objectness, *corrections), (*heads[0], *heads[1]), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(scores, wanted[0])
    assert torch.equal(boxes, wanted[1])
    assert loss > 0.1
    _, loss = teacher.lesson(dense, (images,), lambda: None)
    assert loss == 0


@pytest.mark.parametrize(("make", "lr"), [(tiny_detector, 0.01), (retinanet, 0.001)])
def test_distilling_brings_a_detector_nearer(make, lr, lists):
    dense = make()
    small = copy.deepcopy(dense)
    small.backbone = sgfx.compile(small.backbone, groups=4, ratio=0.5)
    teacher = DetectorTeacher(dense)

    def away():
        with torch.no_grad():
            return teacher.lesson(small.eval(), (images_with_boxes(4, seed=9)[0],), lambda: None)[1].item()

    before, weights = away(), copy.deepcopy(dense)
    sgfx.distill(dense, small, lists, steps=12, lr=lr, progress=False)
    assert away() < 0.9 * before
    assert same_weights(dense, weights)


def test_few_images_are_held_out_and_lists_are_mirrored(lists):
    examples = Examples([(each,) for each in lists * 10])
    assert len(examples.held_out()) == 64 // 4
    drawn = [examples.draw()[0] for _ in range(8)]
    seen = {id(x): x for given in lists for x in given}
    kinds = set()
    for given in drawn:
        for image in given:
            plain = any(image.shape == x.shape and torch.equal(image, x) for x in seen.values())
            flipped = any(image.shape == x.shape and torch.equal(image, x.flip(-1)) for x in seen.values())
            assert plain != flipped
            kinds.add(plain)
    assert kinds == {True, False}


def test_ratios_of_a_budget_are_judged_by_the_maps(dense, small, lists):
    batches = read_examples(lists, "data", dense)
    found = held_out_error(dense, small, batches)
    calibrated = sgfx.calibrate(dense, copy.deepcopy(small), lists[:3])  # every fourth is judged by
    with torch.no_grad():
        images = dense.transform(lists[3])[0].tensors
        wanted = distance(calibrated.backbone(images), dense.backbone(images)).item()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_budget_of_the_whole_or_of_the_backbone_alone(dense, lists):
    options = {"groups": 4, "budget": {"macs": 0.6}}
    with pytest.raises(
        sgfx.InputError, match=r"budget needs every layer .* 'rpn.head.bbox_pred' is in none, .* ignore"
    ):
        sgfx.compile(dense, calibration=lists[:1], example_inputs=images_with_boxes(2), **options)
    whole = {"groups": 4, "budget": {"macs": 0.95}, "ignore": ("rpn", "roi_heads")}
    small = sgfx.compile(dense, calibration=lists[:1], **whole)
    shares = [count_macs(small, (lists[0],))[path] / count_macs(dense, (lists[0],))[path] for path in ("", "backbone")]
    assert shares[1] < shares[0] == pytest.approx(0.95, abs=0.01)
    batches = [dense.transform(each)[0].tensors for each in lists]
    backbone = sgfx.compile(dense.backbone, calibration=batches, **options)
    one = (batches[0][:1],)
    assert count_macs(backbone, one)[""] / count_macs(dense.backbone, one)[""] == pytest.approx(0.6, abs=0.01)
