"""The standard lists of passes: understand the model once, plan (at every pruning step), then mask or lower."""

from __future__ import annotations

from passes.compression.grouping import Grouping
from passes.compression.importance import Importance
from passes.compression.lowering import Lowering
from passes.compression.masking import Masking
from passes.compression.pruning import Pruning
from passes.compression.selection import Selection
from passes.elimination.analysis import ChannelAnalysis
from passes.elimination.elimination import Elimination
from passes.infra.compilation import Pass
from passes.tracing.regions import Trace

ANALYSIS: tuple[Pass, ...] = (Trace(), Selection())
GROUPING: tuple[Pass, ...] = (Importance(), Grouping())
PRUNING: tuple[Pass, ...] = (Pruning(),)
LOWERING: tuple[Pass, ...] = (Lowering(),)
ELIMINATION: tuple[Pass, ...] = (ChannelAnalysis(), Elimination())


def pruning_step(limit: float) -> tuple[Pass, ...]:
    """One step of a `Pruner`: plans made anew, no layer pruned beyond `limit`, and their masks."""
    return (*GROUPING, Pruning(limit), Masking())
