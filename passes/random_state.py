"""Leave the global random state as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the global generators of torch (CPU and GPUs), numpy and Python back on leaving, whatever happened inside."""
    python, numpy = random.getstate(), np.random.get_state()
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = list(range(torch.cuda.device_count())) if initialized else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed the global generators, so that runs of two models draw the same numbers; within `preserved_random_state`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
