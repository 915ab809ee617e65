"""`sgfx.distill`: a few hundred steps of gradient descent towards a dense model, on unlabelled data."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from passes.calibration import read_examples
from passes.errors import InputError
from passes.infra import preserved_random_state
from passes.models import unhooked_copy
from passes.options import checked_integer, checked_number
from sgfx.calibrating import check_compiled
from sgfx.progress import progress_bar
from sgfx.training.descent import Descent
from sgfx.training.detector_teacher import teacher_of
from sgfx.training.drawing import Examples
from sgfx.training.teacher import in_single_precision

M = TypeVar("M", bound=nn.Module)


def distill(dense: nn.Module, small: M, data: Any, *, steps: int = 400, lr: float = 1e-3, progress: bool = True) -> M:
    """Train a compiled model towards the dense model's outputs, and those of its blocks, without labels.

    Adam with a learning rate that warms up and falls to 0 along a cosine, on batches of 64; images ``[N, C, H, W]`` are
    flipped and shifted at random. Of 512 examples or more 64 are held out; fewer are learnt from and judged by alike.
    Where the distance on these has grown, the weights go back and the rate is halved, and what was nearest is handed
    out: a rate that is too high costs steps, and does not make the model worse.

    A detector is trained towards the maps of the dense one's backbone, its pyramid included, and towards what the heads
    give at the same places, on lists of images of any sizes, a list a step; see `docs/detection.md`.

    The model is in eval mode meanwhile: norms keep their statistics, and their weights are trained. Half precision is
    trained in single precision. Calibrate first: each brings what the other can't.

    Args:
        dense: the model before `sgfx.compile`; it is not changed.
        small: what was made of it, changed in place once everything has succeeded. Parameters with
            ``requires_grad=False`` are left alone.
        data: examples as `sgfx.calibrate` takes them; the more the better.
        steps: steps of Adam, at least 1.
        lr: learning rate to begin with, above 0.
        progress: show a progress bar, on a terminal.

    Returns:
        `small`. If nothing was gained it is as it was, and a warning says so.

    Raises:
        InputError: (a ValueError) a value is out of range, the data do not fit, or there is nothing to train.
        TypeError: an argument is of the wrong type.
        FloatingPointError: the loss became NaN or infinite, and nothing was gained. Nothing is changed after any of
            these.
        KeyboardInterrupt: of Ctrl-C, with a note that says how far it had come: `small` holds what was nearest.
    """
    steps, lr = checked_integer(steps, "steps", least=1), checked_number(lr, "lr", above=0)
    check_compiled(dense, small)
    return descend(dense, small, data, steps=steps, lr=lr, progress=progress)


def descend(dense: nn.Module, small: M, data: Any, *, steps: int, lr: float, progress: bool = True) -> M:
    """The same for any `small` whose outputs have the form of the dense model's."""
    batches = read_examples(data, "data", small)
    with torch.inference_mode(False), torch.enable_grad(), preserved_random_state():
        work = in_single_precision(unhooked_copy(small)).eval()
        trained = [parameter for parameter in work.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("small has nothing to train: no parameter with requires_grad=True; set it on some")
        descent = Descent(work, trained, teacher_of(dense), Examples([in_single_precision(x) for x in batches]))
        try:
            with progress_bar("distill", steps, "step", shown=progress) as tick:
                for _ in descent.run(steps, lr):
                    tick()
        except KeyboardInterrupt as interrupt:
            descent.put_back()
            _adopt(small, work, descent)
            interrupt.add_note(
                f"sgfx: distill was interrupted after {descent.step} of {steps} steps; small "
                + (f"holds what step {descent.nearest_step} reached" if descent.nearest_step else "is as it was")
            )
            raise
    _adopt(small, work, descent)
    if not descent.nearest_step:
        warnings.warn(
            f"distill gained nothing in {steps} steps from lr={lr:g}, halved {descent.halved} times: small is as it "
            "was. Try more steps or more data",
            stacklevel=3,
        )
    return small


def _adopt(small: nn.Module, work: nn.Module, descent: Descent) -> None:
    """Copy into `small`, in place, what was reached in `work`, if anything was."""
    if descent.nearest_step:
        with torch.no_grad():
            for mine, theirs in zip(small.parameters(), work.parameters(), strict=True):
                mine.copy_(theirs)
