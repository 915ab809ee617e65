"""Whole networks, frozen, against their eval forms, with small pictures."""

import pytest
import torch
import torchvision

import models_zoo
import sgfx
from passes.kernel import PackedConv2d, supported
from passes.layers.grouped import Grouped
from tests.sgfx.test_freeze import error, trained

needs_kernel = pytest.mark.skipif(supported() is not None, reason="the kernel does not run here")
NETWORKS = {
    "resnet50": lambda: models_zoo.create("resnet50", num_classes=10),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=10),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=10),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network):
    torch.manual_seed(0)
    model, images = trained(NETWORKS[network]()), torch.randn(2, 3, 32, 32)
    small = sgfx.compile(model, groups=4, ratio=0.8)
    for each, strategy in ((small, "kernel"), (model, "library")):
        if strategy == "library" or supported() is None:
            frozen = sgfx.freeze(each, images, strategy=strategy)
            assert strategy in {layer.way for layer in frozen.decisions.layers.values()}
            assert error(frozen, each, images) < 1e-4
            assert error(frozen, each, torch.randn(1, 3, 64, 32)) < 1e-4


def test_what_was_measured_and_what_was_decided_give_the_same():
    model, images = trained(NETWORKS["mobilenet_v3"]()), torch.randn(1, 3, 32, 32)
    small = sgfx.compile(model, groups=4, ratio=0.8)
    frozen = sgfx.freeze(small, images)
    assert error(frozen, small, images) < 1e-4
    again = sgfx.freeze(small, images, decisions=frozen.decisions.to_dict())
    with torch.no_grad():
        assert torch.equal(again(images), frozen(images))


@needs_kernel
def test_a_detector():
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(backbone, 5)
    model = torchvision.models.detection.FasterRCNN(
        backbone, num_classes=3, min_size=64, max_size=96, rpn_post_nms_top_n_test=20, box_score_thresh=0.0
    ).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    small = sgfx.compile(model, groups=4, ratio=0.6, example_inputs=(images,))
    frozen = sgfx.freeze(small, (images,), strategy="kernel")
    assert type(frozen) is type(model)
    assert frozen.backbone.out_channels == model.backbone.out_channels
    assert any(isinstance(module, PackedConv2d) for module in frozen.backbone.modules())
    assert not any(isinstance(module, Grouped) for module in frozen.modules())
    with torch.no_grad():
        features, expected = (each.backbone(torch.stack([images[0]])) for each in (frozen, small))
        for name, value in expected.items():
            assert (features[name] - value).abs().max() <= 1e-4 * value.abs().max()
        for found, wanted in zip(frozen(images), small(images), strict=True):
            assert torch.equal(found["labels"], wanted["labels"])
            for key in ("boxes", "scores"):
                assert (found[key] - wanted[key]).abs().max() <= 1e-4 * wanted[key].abs().max()
    report, before = sgfx.report(model, frozen, (images,)), sgfx.report(model, small, (images,))
    assert report.macs <= before.macs
    assert report.macs_dense == before.macs_dense
    run = {layer.path for layer in report.layers if layer.way}
    assert {path for path, plan in sgfx.plans(small).items() if plan.grouped} <= run
