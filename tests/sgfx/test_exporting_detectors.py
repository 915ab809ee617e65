"""Whole detectors as ONNX files: they find in ONNX Runtime what the detector finds, in images of other sizes too."""

import onnxruntime
import pytest
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

import sgfx
from passes.errors import InputError
from sgfx.exporting.detectors import matched
from tests.tools.detection import images_with_boxes, tiny_detector

IMAGES, TARGETS = images_with_boxes(2)
NAMES = ["boxes", "labels", "scores"]
SIZES = [(20, 70), (41, 33), (64, 64)]


def compiled(model):
    return sgfx.compile(model, groups=2, ratio=0.5, example_inputs=(IMAGES, TARGETS))


def assert_same(file, model):
    """Every thing that the detector finds has one in the file, of its label, with its box and score; and no more."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        image = torch.rand(3, *size, generator=generator)
        found = dict(zip(NAMES, map(torch.from_numpy, session.run(NAMES, {"image": image.numpy()})), strict=True))
        with torch.no_grad():
            wanted = model([image])[0]
        assert len(wanted["scores"]) == len(found["scores"]) > 0
        left = list(range(len(found["scores"])))
        for box, label, score in zip(*(wanted[name] for name in NAMES), strict=True):
            near = [
                i
                for i in left
                if found["labels"][i] == label
                and abs(found["scores"][i] - score) < 1e-4
                and (found["boxes"][i] - box).abs().max() < 1e-4
            ]
            left.remove(near[0])


@pytest.mark.parametrize("form", ["dense", "blocks"])
def test_a_file_finds_what_the_detector_finds(tmp_path, form):
    small = compiled(tiny_detector())
    assert not small.training
    written = sgfx.export(small, tmp_path / "small.onnx", (IMAGES, TARGETS), form=form)
    assert written.max_difference < 1e-4
    assert_same(written.path, small)


def test_torchvisions_own_detector_and_one_without_a_pyramid(tmp_path):
    torch.manual_seed(0)
    theirs = fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, rpn_score_thresh=0.0
    ).eval()
    for number, model in enumerate((theirs, tiny_detector(fpn=False))):
        written = sgfx.export(model, tmp_path / f"{number}.onnx", ([IMAGES[0]],))
        assert_same(written.path, model)


def test_names_are_the_users(tmp_path):
    sgfx.export(
        tiny_detector(), tmp_path / "d.onnx", ([IMAGES[0]],), input_names=["x"], output_names=["where", "what", "sure"]
    )
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    assert [x.name for x in session.get_inputs()] == ["x"]
    assert [x.name for x in session.get_outputs()] == ["where", "what", "sure"]


def test_things_of_equal_scores_may_change_places():
    boxes = torch.tensor([[0.0, 0, 1, 1], [2.0, 2, 3, 3], [0.0, 0, 1, 1]])
    wanted = [boxes, torch.tensor([1, 1, 2]), torch.tensor([0.5, 0.5, 0.5])]
    order = torch.tensor([2, 0, 1])
    found = matched([x[order] for x in wanted], wanted, NAMES)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    other = [boxes, torch.tensor([1, 1, 1]), wanted[2]]
    assert matched(other, wanted, NAMES) is other


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((IMAGES[0],), {}, "must begin with a list of images"),
        (([],), {}, "must begin with a list of images"),
        (([IMAGES[0]],), {"dynamic_shapes": ({1: "height"},)}, "an image of any size as it is"),
        (([IMAGES[0]],), {"output_names": ["boxes"]}, "1 names for 3 output tensors"),
    ],
)
def test_what_is_refused(tmp_path, inputs, options, message):
    with pytest.raises(InputError, match=message):
        sgfx.export(tiny_detector(), tmp_path / "d.onnx", inputs, **options)
    assert not list(tmp_path.iterdir())
