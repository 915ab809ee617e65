"""What a dense detector teaches: the maps of its backbone, and what its heads give at the same places.

Which boxes come out at the end is a choice by value, and two detectors that differ a little choose other ones. So what
is compared stands before the choices: every map that the backbone gives, its pyramid included; what the heads give at
every pixel of the maps; and, of an R-CNN, what they give for the boxes that the dense detector proposes, for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from passes.models import is_detector
from sgfx.training.teacher import Teacher

T = TypeVar("T")
PROPOSALS = 128  # the best of each image


class Places(NamedTuple):
    """Where two detectors are compared.

    Attributes:
        images: resized, and in one tensor (torchvision's ``ImageList``).
        proposals: boxes of each image; empty for a detector of one stage.
    """

    images: Any
    proposals: list[Tensor]


class DetectorTeacher(Teacher):
    """A dense detector, which takes lists of images and resizes them by its own ``transform``."""

    _places: Places

    def lesson(self, model: nn.Module, inputs: tuple[Any, ...], run: Callable[[], T]) -> tuple[T, Tensor]:
        """See `Teacher`; the model is not run as a whole, but part by part at the teacher's places."""
        outputs: Any
        outputs, loss = super().lesson(model, inputs, lambda: given_at(model, self._places))
        return outputs, loss

    def teach(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Look at the images, and give what `given_at` gives for the places that were found."""
        detector: Any = self.model
        images = detector.transform(inputs[0])[0]
        if not hasattr(detector, "rpn"):
            self._places = Places(images, [])
            return given_at(detector, self._places)
        maps, heads = _maps(detector, images), list[Any]()
        with detector.rpn.head.register_forward_hook(lambda _, __, given: heads.append(given)):
            proposals, _ = detector.rpn(images, maps)
        self._places = Places(images, [boxes[:PROPOSALS] for boxes in proposals])
        return [maps, *heads, _boxes(detector, maps, self._places)]


def teacher_of(dense: nn.Module) -> Teacher:
    """The teacher for a model of this kind."""
    return DetectorTeacher(dense) if is_detector(dense) else Teacher(dense)


def given_at(detector: Any, places: Places) -> list[Any]:
    """The maps of a detector's backbone, and what its heads give at these places."""
    maps = _maps(detector, places.images)
    if hasattr(detector, "rpn"):
        return [maps, detector.rpn.head(list(maps.values())), _boxes(detector, maps, places)]
    return [maps, detector.head(list(maps.values()))]


def _maps(detector: Any, images: Any) -> dict[str, Tensor]:
    maps = detector.backbone(images.tensors)
    return {"0": maps} if isinstance(maps, Tensor) else maps


def _boxes(detector: Any, maps: dict[str, Tensor], places: Places) -> Any:
    """Scores and corrections of the proposals."""
    heads = detector.roi_heads
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, places.proposals, places.images.image_sizes)))
