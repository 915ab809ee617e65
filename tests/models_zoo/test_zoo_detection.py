"""Faster R-CNN on the zoo's and torchvision's classifiers: maps, sizes, and what compiling makes of it."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import models_zoo
import sgfx
from tests.tools.detection import images_with_boxes, tiny_detector

RELU = {"norm5", "bn1"}  # behind which the forward of a classifier has a ReLU that is no module
CLASSIFIERS = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "densenet121": ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.norm5"),
    "resnet20": ("layer1", "layer2", "layer3"),
    "densenet_bc": ("block1", "block2", "bn1"),
}


def classifier(name):
    torch.manual_seed(0)
    options = {"depth": 10, "growth": 4} if name == "densenet_bc" else {}
    made = (
        models_zoo.create(name, **options)
        if name in models_zoo.list()
        else torchvision.models.get_model(name, weights=None)
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return made.eval()


def maps_seen(model, stages, image):
    """What hooks see behind the stages of the classifier itself."""
    seen = {}
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda _, __, y, stage=stage: seen.update({stage: y.clone()}))
    with torch.no_grad():
        model(image)
    return [F.relu(seen[stage]) if stage.rpartition(".")[2] in RELU else seen[stage] for stage in stages]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_trunk_gives_the_maps_that_the_classifier_computes(name):
    model, image = classifier(name), torch.randn(1, 3, 64, 64)
    wanted = maps_seen(classifier(name), CLASSIFIERS[name], image)
    detector = models_zoo.faster_rcnn(model, num_classes=3, channels=8).eval()
    with torch.no_grad():
        found = detector.backbone.body(image)
        assert list(found) == list(map(str, range(len(wanted))))
        assert all(torch.equal(x, y) for x, y in zip(found.values(), wanted, strict=True))
        last = models_zoo.faster_rcnn(model, num_classes=3, fpn=False).eval().backbone
        assert torch.equal(last(image), wanted[-1])
        assert last.out_channels == wanted[-1].shape[1]
    strides = [64 // each.shape[-1] for each in wanted]
    assert [size for (size,) in detector.rpn.anchor_generator.sizes] == [8 * s for s in (*strides, 2 * strides[-1])]
    assert detector.training is False
    assert model.training is False


def test_a_resnet50_has_torchvisions_names_sizes_and_weights():
    own = models_zoo.faster_rcnn("resnet50", num_classes=91)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    shapes, wanted = ({name: x.shape for name, x in model.state_dict().items()} for model in (own, theirs))
    assert {k: v for k, v in shapes.items() if "num_batches_tracked" not in k} == {
        k: v for k, v in wanted.items() if "num_batches_tracked" not in k
    }
    assert own.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert (own.transform.min_size, own.transform.max_size) == (theirs.transform.min_size, theirs.transform.max_size)
    assert own.training


@pytest.mark.parametrize("fpn", [True, False])
def test_it_takes_images_of_several_sizes_and_learns(fpn):
    detector = tiny_detector(fpn=fpn)
    images, targets = images_with_boxes()
    for found in detector(images):
        assert found.keys() == {"boxes", "labels", "scores"}
        assert set(found["labels"].tolist()) <= {1, 2}
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_the_trunk_may_be_compiled_before_or_after():
    model = classifier("densenet_bc")
    before = tiny_detector(sgfx.compile(model, groups=4, ratio=0.5))
    after = tiny_detector(model)
    after.backbone = sgfx.compile(after.backbone, groups=4, ratio=0.5, ignore="fpn")
    own, other = (sgfx.plans(each.backbone.body) for each in (before, after))
    assert own == other
    assert sum(plan.grouped for plan in own.values()) > 5
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        one, two = before.backbone.body(image), after.backbone.body(image)
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert after.backbone.out_channels == 8
    before.train()(*images_with_boxes())


def test_a_trunk_without_unread_filters_has_fewer_channels_in_its_maps():
    model = sgfx.compile(classifier("densenet_bc"), groups=4, ratio=0.9, eliminate=True)
    detector = tiny_detector(model)
    assert sgfx.report(classifier("densenet_bc"), model, torch.zeros(1, 3, 32, 32)).to_dict()["filters_eliminated"]
    assert len(detector(images_with_boxes()[0])) == 2


def test_the_whole_detector_compiles_with_a_ratio_for_linear_layers(tmp_path):
    dense, batch = tiny_detector(), images_with_boxes()
    small = sgfx.compile(dense, groups=4, ratio=0.5, linear_ratio=0.75, example_inputs=batch)
    plans = sgfx.plans(small)
    ratios = {path: plan.requested_ratio for path, plan in plans.items() if plan.grouped}
    assert ratios["backbone.body.block1.layer.0.conv2"] == ratios["backbone.fpn.layer_blocks.0.0"] == 0.5
    assert ratios["roi_heads.box_head.fc6"] == ratios["roi_heads.box_predictor.bbox_pred"] == 0.75
    assert sgfx.verify(dense.double(), small.double(), doubled(batch)).max_error < 1e-9
    sgfx.save(small, tmp_path / "small.safetensors")
    again = sgfx.load(tmp_path / "small.safetensors", into=tiny_detector().double())
    for one, two in zip(small(doubled(batch)[0]), again(doubled(batch)[0]), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def doubled(batch):
    images, targets = batch
    return [x.double() for x in images], [{**each, "boxes": each["boxes"].double()} for each in targets]


def test_what_was_compiled_is_not_compiled_again():
    small = tiny_detector()
    small.backbone = sgfx.compile(small.backbone, groups=4, ratio=0.5)
    with pytest.raises(sgfx.InputError, match="was compiled before"):
        sgfx.compile(small.backbone, ratio=0.5)
    before = sgfx.plans(small.backbone)
    rest = sgfx.plans(sgfx.compile(small, groups=4, ratio=0.25, ignore="roi_heads"))
    assert {path: rest[f"backbone.{path}"] for path in before} == before
    assert rest["rpn.head.conv.0.0"].requested_ratio == 0.25


def test_without_targets_it_says_which_layers_could_not_be_followed():
    small = sgfx.compile(tiny_detector(), groups=4, ratio=0.5, example_inputs=(images_with_boxes()[0],))
    plan = sgfx.plans(small)["rpn.head.bbox_pred"]
    assert not plan.grouped
    assert "train mode failed: targets should not be none when in training mode" in plan.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "one more than the data have"),
        ({"num_classes": 2.0}, "num_classes must be a whole number"),
        ({"channels": 0}, "channels must be a whole number"),
        ({"min_sizes": 3}, "faster_rcnn has no option 'min_sizes'; it accepts: .*min_size"),
        ({"backbone": "resnet19"}, "neither the zoo nor torchvision has a classifier named 'resnet19'; did you mean"),
        ({"backbone": "lenet5"}, "must be a ResNet or DenseNet of torchvision or of the zoo, .* is LeNet5"),
        ({"backbone": models_zoo.create("resnet20", in_channels=1)}, "images of 1 channels, and the detector those of"),
    ],
)
def test_what_it_can_not_be_made_of(arguments, message):
    with pytest.raises(ValueError, match=message):
        models_zoo.faster_rcnn(**{"backbone": "resnet20", "num_classes": 3, **arguments})
