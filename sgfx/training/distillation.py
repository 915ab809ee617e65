"""`sgfx.distill`: a few hundred steps of gradient descent towards a dense model, on unlabelled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from passes.calibration.data import Arguments, read_examples, shapes_of, single_image
from passes.errors import InputError
from passes.infra.random_state import preserved_random_state
from passes.models.copying import copy_inputs, unhooked_copy
from passes.options.arguments import call
from sgfx.calibrating import check_compiled
from sgfx.progress import progress_bar
from sgfx.training.teacher import Teacher, in_single_precision

M = TypeVar("M", bound=nn.Module)
BATCH = 64  # examples per step
SHIFT = 8  # images are shifted by up to this part of their size


def distill(dense: nn.Module, small: M, data: Any, *, steps: int = 400, lr: float = 1e-3, progress: bool = True) -> M:
    """Train a compiled model towards the dense model's outputs, and those of its blocks, without labels.

    Adam with a learning rate that falls to 0 along a cosine, on batches of 64; images ``[N, C, H, W]`` are flipped and
    shifted at random. The model is in eval mode meanwhile: norms keep their statistics, and their weights are trained.
    Half precision is trained in single precision. Calibrate first: each brings what the other can't.

    Args:
        dense: the model before `sgfx.compile`; it is not changed.
        small: what was made of it, changed in place once everything has succeeded. Parameters with
            ``requires_grad=False`` are left alone.
        data: examples as `sgfx.calibrate` takes them; the more the better.
        steps: steps of Adam, at least 1.
        lr: learning rate at the start, above 0. Compare the accuracy before and after: a rate that is too high for a
            network makes it worse.
        progress: show a progress bar, on a terminal.

    Returns:
        `small`.

    Raises:
        InputError: (a ValueError) a value is out of range, the data do not fit, or there is nothing to train.
        TypeError: an argument is of the wrong type.
        FloatingPointError: the loss became NaN or infinite. Nothing is changed after any of these.
        KeyboardInterrupt: of Ctrl-C, with a note that says how far it had come: `small` holds what was reached.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, not {steps!r}")
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise InputError(f"lr must be a number above 0, not {lr!r}")
    check_compiled(dense, small)
    return descend(dense, small, data, steps=int(steps), lr=float(lr), progress=progress)


def descend(dense: nn.Module, small: M, data: Any, *, steps: int, lr: float, progress: bool = True) -> M:
    """The same for any `small` whose outputs have the form of the dense model's."""
    batches = read_examples(data, "data", small)
    with torch.inference_mode(False), torch.enable_grad(), preserved_random_state():
        work = in_single_precision(unhooked_copy(small)).eval()
        trained = [parameter for parameter in work.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("small has nothing to train: no parameter with requires_grad=True; set it on some")
        draw = _drawer([in_single_precision(x) for x in batches])
        reached = _Reached(trained)
        try:
            with progress_bar("distill", steps, "step", shown=progress) as tick:
                for _ in _descend(work, trained, Teacher(dense), draw, steps, lr):
                    reached.keep()
                    tick()
        except KeyboardInterrupt as interrupt:
            if reached.steps:
                _adopt(small, work, reached)
            interrupt.add_note(
                f"sgfx: distill was interrupted after {reached.steps} of {steps} steps; small "
                + ("holds what was reached" if reached.steps else "is as it was")
            )
            raise
    _adopt(small, work, reached)
    return small


class _Reached:
    """Parameters as the last whole step left them: the one that Ctrl-C ends may have moved some of them only."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self._live: list[Tensor] = list(trained)
        self._kept = [parameter.detach().clone() for parameter in trained]
        self.steps = 0

    def keep(self) -> None:
        """Take the parameters as they are."""
        with torch.no_grad():
            torch._foreach_copy_(self._kept, self._live)  # one call, so all of them or none
        self.steps += 1

    def put_back(self) -> None:
        """Give them the values that were kept last."""
        with torch.no_grad():
            torch._foreach_copy_(self._live, self._kept)


def _adopt(small: nn.Module, work: nn.Module, reached: _Reached) -> None:
    """Copy into `small`, in place, what was reached in `work`."""
    reached.put_back()
    with torch.no_grad():
        for mine, theirs in zip(small.parameters(), work.parameters(), strict=True):
            mine.copy_(theirs)


def _descend(
    model: nn.Module,
    trained: list[nn.Parameter],
    teacher: Teacher,
    draw: Callable[[], Arguments],
    steps: int,
    lr: float,
) -> Iterator[int]:
    """Train step by step; yields after each."""
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        inputs = draw()
        _, loss = teacher.lesson(model, inputs, partial(_run, model, inputs))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()} in step {step}; try an lr below {lr:g}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield step


def _run(model: nn.Module, inputs: Arguments) -> Any:
    try:
        return call(model, inputs)
    except Exception as error:
        hint = single_image(inputs)
        raise InputError(f"data of shape {shapes_of(inputs)} do not fit the model: {error}{hint}") from error


def _drawer(batches: list[Arguments]) -> Callable[[], Arguments]:
    """A function that draws the inputs of one step; every example comes once before any comes again."""
    generator = torch.Generator().manual_seed(0)
    forms = [[x.shape[1:] if isinstance(x, Tensor) else None for x in given] for given in batches]
    alike = all(form == forms[0] for form in forms) and None not in forms[0]
    whole = alike and all(len(x) == len(given[0]) for given in batches for x in given)
    examples = [torch.cat(each) for each in zip(*batches, strict=True)] if whole else None
    count = len(batches) if examples is None else len(examples[0])
    left = torch.empty(0, dtype=torch.int64)

    def draw() -> Arguments:
        nonlocal left
        if not len(left):
            left = torch.randperm(count, generator=generator)
        if examples is None:
            (chosen,), left = left[:1].tolist(), left[1:]
            return tuple(copy_inputs(batches[chosen]))
        chosen, left = left[:BATCH], left[BATCH:]
        drawn = [x[chosen.to(x.device)] for x in examples]
        return (varied(drawn[0], generator),) if len(drawn) == 1 else tuple(drawn)

    return draw


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[N, C, H, W]`` flipped and shifted at random, with 0 coming in; others as they are."""
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
