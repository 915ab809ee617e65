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
PLANNING: tuple[Pass, ...] = (*GROUPING, *PRUNING)
LOWERING: tuple[Pass, ...] = (Lowering(),)
PRUNING_STEP: tuple[Pass, ...] = (*PLANNING, Masking())
ELIMINATION: tuple[Pass, ...] = (ChannelAnalysis(), Elimination())
