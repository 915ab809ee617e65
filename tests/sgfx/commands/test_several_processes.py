"""A command under a launcher: both processes train, one writes and prints."""

import os
import subprocess
import sys
from pathlib import Path

import sgfx

ROOT = Path(sgfx.__file__).parent.parent


def test_compress_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sgfx", "compress"]
    command += ["--model", "lenet5", "--model_options", "{in_channels: 3, num_classes: 4}", "--data", "synthetic"]
    command += ["--ratio", "0.5", "--groups", "2", "--recipe", "cifar-global", "--iterations", "1", "--no_progress"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, "--out", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compressed") == 1
    assert (tmp_path / "run" / "final.safetensors").exists()
