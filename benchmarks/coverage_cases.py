"""The networks of the coverage sweep: how each is built, with random weights, and on what inputs it is compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import models

from tests.tools.oracle import prepare

# The heads of detectors: what is left after suppression is no measure, with random weights often nothing.
HEADS = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor", "head")

# Smallest inputs that a network takes, where 64 × 64 pixels are too few (or the size is part of the architecture).
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28, "raft_large": 128, "raft_small": 128}
CLIPS = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}
TIMM_SIZES = {"inception_v4": 128, "inception_resnet_v2": 128, "nasnetalarge": 96, "pnasnet5large": 96}

# Convolutional families of timm, one or two small members each.
TIMM = (
    *("resnet18", "resnet26d", "resnet10t", "resnext50_32x4d", "seresnet18", "ecaresnet26t", "skresnet18"),
    *("resnest14d", "res2net50_26w_4s", "resnetv2_18", "resnetv2_50x1_bit", "resnetrs50", "nf_resnet26"),
    *("dm_nfnet_f0", "eca_nfnet_l0", "densenet121", "dla34", "dpn48b", "hrnet_w18_small", "vgg11_bn"),
    *("regnetx_002", "regnety_002", "regnetz_b16", "repvgg_a0", "mobileone_s0", "gernet_s", "cspresnet50"),
    *("cs3darknet_s", "darknet53", "xception41", "inception_v4", "inception_resnet_v2", "inception_next_atto"),
    *("efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_t", "mobilenetv2_050", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mnasnet_small", "semnasnet_075", "fbnetc_100", "spnasnet_100", "tinynet_e"),
    *("lcnet_050", "mixnet_s", "rexnet_100", "hardcorenas_a", "ghostnet_100", "ghostnetv2_100", "repghostnet_050"),
    *("convnext_atto", "convnextv2_atto", "convmixer_768_32", "edgenext_xx_small", "poolformer_s12", "fasternet_t0"),
    *("hgnet_tiny", "hgnetv2_b0", "ese_vovnet19b_dw", "selecsls42", "starnet_s1", "rdnet_tiny", "pnasnet5large"),
)


@dataclass(frozen=True)
class Case:
    """A network and how it is compared.

    Attributes:
        name: its name; timm's start with ``timm/``.
        family: classification, segmentation, detection, video, optical flow, quantized or timm.
        build: makes it anew, the same every time, prepared for the comparison.
        evaluation: positional arguments of its forward in eval mode.
        training: the same in train mode.
        taps: paths of modules whose outputs are compared beside the model's own.
        dtype: what it is computed in.
        tolerance: the largest relative difference that counts as equal.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    evaluation: tuple[Any, ...]
    training: tuple[Any, ...]
    taps: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8


def names(*, timm: bool) -> list[str]:
    """All names of the sweep: torchvision's, or timm's."""
    return [f"timm/{name}" for name in TIMM] if timm else models.list_models()


def family_of(name: str) -> str:
    """What kind of network a name stands for."""
    if name.startswith("timm/"):
        return "timm"
    modules = {
        "quantized": models.quantization,
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
        "optical flow": models.optical_flow,
    }
    found = (family for family, module in modules.items() if name in models.list_models(module=module))
    return next(found, "classification")


def case(name: str) -> Case:
    """Make the case of a name in `names`."""
    family = family_of(name)
    if family == "optical flow":
        pair = tuple(torch.rand(1, 3, SIZES[name], SIZES[name], generator=_generator(i)) * 2 - 1 for i in (0, 1))
        build = partial(_built, name, torch.float32)
        return Case(name, family, build, (*pair, 2), (*pair, 2), (), torch.float32, 1e-4)
    if family == "detection":
        return _detector(name)
    options: dict[str, Any] = {}
    if family == "segmentation":
        options = {"weights_backbone": None} | ({} if "lraspp" in name else {"aux_loss": True})
    size = _size(name, family)
    if name.startswith("vit"):
        options = {"image_size": size[0]}
    images = torch.randn(1 if name in CLIPS else 2, 3, *size, generator=_generator(0), dtype=torch.float64)
    return Case(name, family, partial(_built, name, torch.float64, **options), (images,), (images,))


def _size(name: str, family: str) -> tuple[int, ...]:
    if family == "video":
        frames, pixels = CLIPS.get(name, (4, 64))
        return frames, pixels, pixels
    pixels = TIMM_SIZES.get(name.removeprefix("timm/"), 64) if family == "timm" else SIZES.get(name, 64)
    return pixels, pixels


def _detector(name: str) -> Case:
    images, targets = _scenes()
    options: dict[str, Any] = {"weights_backbone": None}
    if not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:  # proposals, which a second stage examines one by one
        options |= {"rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 60, "box_batch_size_per_image": 16}
    build = partial(_built, name, torch.float64, **options)
    taps = tuple(path for path, _ in build().named_modules() if path in HEADS)
    return Case(name, "detection", build, (images,), (images, targets), taps)


def _built(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, initialisation and quantization; none of it matters here
        if name.startswith("timm/"):
            import timm

            model: nn.Module = timm.create_model(name.removeprefix("timm/"), pretrained=False)
        elif name.startswith("quantized_"):
            return cast(nn.Module, models.get_model(name, weights=None, quantize=True))
        else:
            if name in ("googlenet", "inception_v3"):
                options["init_weights"] = False  # the initialisation of the paper takes a minute
            model = models.get_model(name, weights=None, **options)
    return prepare(model.to(dtype))


def _scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with an object each: box, label, mask and keypoints."""
    images = [torch.rand(3, 96, 128, generator=_generator(i), dtype=torch.float64) for i in (0, 1)]
    targets = []
    for left in (16.0, 40.0):
        box = torch.tensor([[left, 16.0, left + 48, 72.0]], dtype=torch.float64)
        mask = torch.zeros(1, 96, 128, dtype=torch.uint8)
        mask[:, 20:60, int(left) : int(left) + 40] = 1
        keypoints = torch.tensor([[[left + 3.0 * k, 20.0 + 2 * k, 1.0] for k in range(17)]])
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask, "keypoints": keypoints})
    return images, targets


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
