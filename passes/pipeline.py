"""The standard lists of passes: understand the model once, plan (at every pruning step), then mask or lower."""

from __future__ import annotations

from passes.channels import ChannelAnalysis
from passes.elimination import Elimination
from passes.grouping import Grouping
from passes.importance import Importance
from passes.lowering import Lowering
from passes.masking import Masking
from passes.pruning import Pruning
from passes.regions import Trace
from passes.selection import Selection
from passes.unit import Pass

ANALYSIS: tuple[Pass, ...] = (Trace(), Selection())
GROUPING: tuple[Pass, ...] = (Importance(), Grouping())
PRUNING: tuple[Pass, ...] = (Pruning(),)
PLANNING: tuple[Pass, ...] = (*GROUPING, *PRUNING)
LOWERING: tuple[Pass, ...] = (Lowering(),)
PRUNING_STEP: tuple[Pass, ...] = (*PLANNING, Masking())
ELIMINATION: tuple[Pass, ...] = (ChannelAnalysis(), Elimination())
