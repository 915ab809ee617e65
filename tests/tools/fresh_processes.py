"""Fresh processes for tests, forked from a server that has imported what takes seconds, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sgfx.training.running", "accelerate", "torchmetrics.classification"])


def start(
    function: Callable[..., object], *given: Any, output: Path, environment: Mapping[str, object] | None = None
) -> BaseProcess:
    """Call a function of a module in a process of its own, which writes to ``output.out`` and ``output.err``."""
    variables = {name: str(value) for name, value in (environment or {}).items()}
    process = _CONTEXT.Process(target=_run, args=(function, given, output, variables))
    process.start()
    return process


def _run(function: Callable[..., object], given: tuple[Any, ...], output: Path, variables: dict[str, str]) -> None:
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and left behind by those that are killed
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    torch.set_num_threads(1)
    function(*given)
