"""What a pass is, and how a list of them is run."""

from passes.infra.compilation import Compilation, Facts, Pass
from passes.infra.manager import run_passes
from passes.infra.random_state import own_random_state, preserved_random_state, seed_all

__all__ = [
    "Compilation",
    "Facts",
    "Pass",
    "own_random_state",
    "preserved_random_state",
    "run_passes",
    "seed_all",
]
