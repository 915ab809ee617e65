"""The kernel touches nothing before or behind its tensors, where no memory is mapped; in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from passes.kernel.codegen.target import supported

pytestmark = [
    pytest.mark.skipif(supported() is not None, reason=str(supported())),
    pytest.mark.skipif(sys.platform == "win32", reason="pages are unmapped by mprotect"),
]
BEYOND = """
import ctypes, torch
from tests.tools.guarded_memory import guarded
tensor = guarded(torch.ones(5), at_end={at_end})
assert tensor.tolist() == [1] * 5
ctypes.c_float.from_address(tensor.data_ptr() + {offset}).value
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)


def test_layers_of_every_kind_stay_within_their_tensors() -> None:
    done = run("-m", "tests.tools.guarded_memory")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("at_end", "offset"), [(True, 20), (False, -4)])
def test_a_number_beside_a_tensor_ends_the_process(at_end: bool, offset: int) -> None:
    done = run("-c", BEYOND.format(at_end=at_end, offset=offset))
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
