"""The examples that a step of distillation sees, and those that are held out to judge by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from passes.calibration import Arguments, example_count
from passes.models import copy_inputs

BATCH = 64  # examples per step, and the most that are held out
ENOUGH = 512  # from so many examples on some are held out
HELD_SHARE = 8  # at most one example in this many is held out
SHIFT = 8  # images are shifted by up to this part of their size


class Examples:
    """What is learnt from, and what is judged by: others where there are many, some of the same where there are few.

    Tensors of one shape are put together and drawn one by one; other batches are drawn as they came, and lists of
    images as they came too, mirrored at random.

    Args:
        batches: what the model is called with, batch by batch.
    """

    def __init__(self, batches: list[Arguments]) -> None:
        """Part them."""
        forms = [[x.shape[1:] if isinstance(x, Tensor) else None for x in given] for given in batches]
        alike = all(form == forms[0] for form in forms) and None not in forms[0]
        self._whole = alike and all(len(x) == len(given[0]) for given in batches for x in given)
        examples = [torch.cat(each) for each in zip(*batches, strict=True)] if self._whole else []
        count = len(examples[0]) if self._whole else len(batches)
        rows = sum(example_count(given) for given in batches)
        self._lists = isinstance(batches[0][0], list)
        most = max(1, BATCH * len(batches) // rows) if self._lists else BATCH  # images of detectors are large
        self._held, self._taught = _split(count, most, apart=rows >= ENOUGH)
        self._examples, self._batches = examples, batches
        self._generator = torch.Generator().manual_seed(0)
        self._left = torch.empty(0, dtype=torch.int64)

    def held_out(self) -> list[Arguments]:
        """Batches of what is judged by, as they came."""
        if self._whole:
            return [tuple(self._at(self._held))]
        return [tuple(copy_inputs(self._batches[index])) for index in self._held.tolist()]

    def draw(self) -> Arguments:
        """The inputs of one step; every example comes once before any comes again. Single images are varied."""
        if not len(self._left):
            self._left = self._taught[torch.randperm(len(self._taught), generator=self._generator)]
        size = BATCH if self._whole else 1
        chosen, self._left = self._left[:size], self._left[size:]
        if self._lists:
            return ([mirrored(image, self._generator) for image in self._batches[int(chosen)][0]],)
        if not self._whole:
            return tuple(copy_inputs(self._batches[int(chosen)]))
        drawn = self._at(chosen)
        return (varied(drawn[0], self._generator),) if len(drawn) == 1 else tuple(drawn)

    def _at(self, places: Tensor) -> list[Tensor]:
        return [x[places.to(x.device)] for x in self._examples]


def _split(count: int, most: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Indices of the examples to judge by, spread evenly, and of those to learn from: the others if `apart`, or all."""
    every = torch.arange(count)
    held = min(most, count // HELD_SHARE if apart else count)
    if not held:
        return every, every
    judged = torch.arange(held) * count // held
    taught = torch.ones(count, dtype=torch.bool)
    taught[judged] = not apart
    return judged, every[taught]


def mirrored(image: Tensor, generator: torch.Generator) -> Tensor:
    """An image ``[C, H, W]``, or its mirror image, by chance."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image.clone()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[N, C, H, W]`` flipped and shifted at random, with 0 coming in; others as they are.

    `sgfx.data.augmentation` does so too, by as many pixels whatever the size, and draws from the global generator of
    the images' device, which the trainer seeds. Here all draws come from one generator on the CPU, in this order, so
    that distilling sees the same images on every device and leaves global states alone: other numbers for one seed.
    """
    if images.dim() != 4:
        return images
    count, _, height, width = images.shape
    flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flipped, columns.flip(0), columns)
    far_y, far_x = height // SHIFT, width // SHIFT
    down = torch.randint(0, 2 * far_y + 1, (count, 1), generator=generator).to(images.device)
    right = torch.randint(0, 2 * far_x + 1, (count, 1), generator=generator).to(images.device)
    padded = nn.functional.pad(images, (far_x, far_x, far_y, far_y)).movedim(1, -1)
    rows = torch.arange(height, device=images.device) + down
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[..., None], (columns + right)[:, None]].movedim(-1, 1).contiguous()
