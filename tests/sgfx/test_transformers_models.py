"""Image models of Hugging Face, as they come: called by keyword, with outputs in dataclasses. Nothing is downloaded."""

import pytest
import torch

import sgfx
from passes.layers.grouped import Grouped

transformers = pytest.importorskip("transformers")
INPUTS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    return transformers.ResNetForImageClassification(config), 9


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config), 7


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, num_stages=2)
    return transformers.ConvNextForImageClassification(config), 6


def segformer():
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2]}
    heads = {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "decoder_hidden_size": 16, "num_labels": 5}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes, **heads)), 18


@pytest.mark.parametrize("called_before", [False, True])
def test_models_that_hook_themselves_in_their_first_call(called_before):
    torch.manual_seed(0)
    dense, regrouped = segformer()
    if called_before:
        dense.eval()(**INPUTS)
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=INPUTS)
    assert sum(isinstance(module, Grouped) for module in small.modules()) == regrouped
    small.eval()(**INPUTS)
    assert sgfx.verify(dense, small, INPUTS).max_error < 1e-5


@pytest.mark.parametrize("make", [resnet, vit, convnext])
def test_they_are_compiled_verified_frozen_and_reported_as_they_come(make):
    torch.manual_seed(0)
    dense, regrouped = make()
    small = sgfx.compile(dense.double(), groups=2, ratio=0.5, example_inputs=double(INPUTS), eliminate=True)
    assert sum(isinstance(module, Grouped) for module in small.modules()) == regrouped
    found = sgfx.verify(dense, small, double(INPUTS))
    assert (found.max_error < 1e-12, found.gradient_error < 1e-10) == (True, True)
    assert sgfx.report(dense, small, double(INPUTS)).macs_removed.achieved > 0.05
    frozen = sgfx.freeze(small, double(INPUTS), strategy="library")
    expected, given = small.eval()(**double(INPUTS)), frozen(**double(INPUTS))
    assert type(given) is type(expected)
    assert torch.allclose(given.logits, expected.logits, atol=1e-12)


def double(inputs):
    return {name: tensor.double() for name, tensor in inputs.items()}


def test_their_datasets_give_dicts():
    torch.manual_seed(0)
    dense, _ = resnet()
    small = sgfx.compile(dense, groups=2, ratio=0.5, example_inputs=INPUTS)
    before = (small.eval()(**INPUTS).logits - dense.eval()(**INPUTS).logits).square().mean()
    sgfx.calibrate(dense, small, [{**INPUTS, "labels": torch.zeros(2, dtype=torch.int64)}])
    assert (small(**INPUTS).logits - dense(**INPUTS).logits).square().mean() < before
