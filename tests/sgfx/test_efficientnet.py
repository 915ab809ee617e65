"""EfficientNet as most people have it, whose convolutions pad as TensorFlow's do."""

import copy

import pytest
import torch

import sgfx
from tests.tools.custom_layers import randomized

efficientnet = pytest.importorskip("efficientnet_pytorch")
pytestmark = pytest.mark.filterwarnings("ignore:the data do not look like what the model was trained on")


def network(image_size, blocks=16):
    from efficientnet_pytorch.utils import get_model_params

    torch.manual_seed(0)
    described, options = get_model_params("efficientnet-b0", {"num_classes": 5})
    options = options._replace(image_size=image_size)
    return randomized(efficientnet.EfficientNet(described[:blocks], options)).eval()


def test_all_layers_but_the_stem_and_the_depthwise_ones_are_regrouped():
    reasons = {plan.reason: 0 for plan in sgfx.plans(sgfx.compile(network(224), ratio=0.5)).values()}
    assert set(reasons) == {None, "first convolution", "depthwise convolution"}


@pytest.mark.parametrize("image_size", [64, None], ids=["static", "dynamic"])
def test_its_first_blocks_are_compiled_exactly_and_frozen_eliminated_and_calibrated(image_size):
    model, images = network(image_size, 3), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    small = sgfx.compile(model, groups=8, ratio=0.6)
    grouped = [path for path, plan in sgfx.plans(small).items() if plan.grouped]
    assert len(grouped) == len(sgfx.plans(small)) - 6  # five depthwise ones and the stem
    assert sgfx.verify(model, small, images).max_error < 1e-13
    eliminated = sgfx.compile(model, groups=8, ratio=0.6, eliminate=True)
    assert sgfx.verify(model, eliminated, images).max_error < 1e-12
    with torch.no_grad():
        frozen, expected = sgfx.freeze(small, images, strategy="library"), small(images)
        assert (frozen(images) - expected).abs().max() < 1e-12 * expected.abs().max()
        calibrated = sgfx.calibrate(model, copy.deepcopy(small), images)
        wanted = model(images)
        assert (calibrated(images) - wanted).norm() < 0.5 * (expected - wanted).norm()
