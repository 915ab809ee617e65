"""Training that is killed (SIGKILL) at random moments, again and again, and gone on with.

``python -m benchmarks.kill_and_resume --kills 100``

A recipe (two pruning steps, local and global training; averages, clipping, dropout, norms, random transforms, a
checkpoint after every step) runs in a process of its own. It is killed a random number of checkpoints later, in the
middle of whatever it does, and started again, to its end; then the next run begins, until it was killed so often. What
each run leaves must be, bit for bit, what one leaves that nobody interrupted: the finished model, the log of every
epoch, the last checkpoint with optimizer, averages and random states. The exit status is 1 if it is not.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.tools.fresh_processes import start
from tests.tools.interrupted_training import follow_to_the_end, kept_in

LONGER = 8  # 96 steps of local and 80 of global training
LATEST = 0.03  # seconds after a checkpoint


def main() -> int:
    """Kill, go on, compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how often a process is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    chance, moments, runs = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        begun = time.perf_counter()
        expected = finished(Path(name, "whole"), 0, chance, moments)
        print(f"without interruption: {time.perf_counter() - begun:.1f} s")
        while (left := options.kills - moments.total()) > 0:
            runs += 1
            made = finished(Path(name, str(runs)), left, chance, moments)
            different = [file for file in expected if made[file] != expected[file]]
            print(
                f"run {runs}: {moments.total()} kills so far; "
                + (f"DIFFERENT: {different}" if different else "the same")
            )
            if different:
                return 1
    print(
        f"{moments.total()} kills in {runs} runs, " + ", ".join(f"{n} in {place}" for place, n in moments.most_common())
    )
    return 0


def finished(folder: Path, kills: int, chance: random.Random, moments: Counter[str]) -> dict[str, Any]:
    """Run to the end, killed at most so often on the way; returns what is kept."""
    folder.mkdir()
    process = begin(folder)
    while kills and wait(process, folder / "run", chance.randint(0, 6)):
        time.sleep(chance.uniform(0, LATEST))
        process.kill()
        process.join()
        if process.exitcode != 0:
            kills -= 1
            moments[place(folder / "run")] += 1
        process = begin(folder)
    process.join()
    if process.exitcode != 0:
        sys.exit((folder / "said.err").read_text())
    return kept_in(folder / "run")


def begin(folder: Path) -> BaseProcess:
    """Start training, or go on with it."""
    return start(follow_to_the_end, folder, LONGER, output=folder / "said")


def wait(process: BaseProcess, run: Path, checkpoints: int) -> bool:
    """Wait for so many checkpoints; returns whether the process is still at work."""
    seen = written(run)
    while process.is_alive():
        if (now := written(run)) != seen:
            seen, checkpoints = now, checkpoints - 1
        if checkpoints <= 0:
            return True
        time.sleep(0.001)
    return False


def written(run: Path) -> dict[Path, int]:
    """The checkpoints there are, each with a number of its own."""
    files = [*run.glob("*/last.pt"), *run.glob("*.pt"), *run.glob("*.safetensors")]
    return {file: file.stat().st_ino for file in files if file.exists()}


def place(run: Path) -> str:
    """Where a run stood when it was killed."""
    if (run / "final.safetensors").exists():
        return "the end"
    phases = [path.parent.name for path in sorted(run.glob("*/last.pt"), key=lambda path: path.parent.name == "global")]
    return phases[-1] if phases else "the beginning"


if __name__ == "__main__":
    sys.exit(main())
