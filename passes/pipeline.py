"""The standard lists of passes. Any of them can be left out or replaced, as far as what others require is there."""

from __future__ import annotations

from passes.calibration.budget.error_curves import ErrorCurves
from passes.calibration.budget.spending import Spending
from passes.calibration.calibrating import Calibration, SeeNorms
from passes.compression.grouping import Grouping
from passes.compression.importance import Importance
from passes.compression.lowering import Lowering
from passes.compression.masking import Masking
from passes.compression.pruning import Pruning
from passes.compression.selection import Selection
from passes.freezing.arranging.chaining import Chaining
from passes.freezing.arranging.placing import Placing
from passes.freezing.arranging.stepping import Stepping
from passes.freezing.choosing.forms import Forming
from passes.freezing.comparing.checking import Comparison
from passes.freezing.parts import RemoveUnread, Rewriting
from passes.freezing.recording import Recording
from passes.freezing.rewrites.activations import FuseActivations
from passes.freezing.rewrites.concatenation import JoinConcatenations
from passes.freezing.rewrites.constants import FoldConstants
from passes.freezing.rewrites.layers import MakeRecipes
from passes.freezing.rewrites.layouts import KeepLayouts
from passes.freezing.rewrites.norms import FoldNorms, KeepNorms
from passes.freezing.rewrites.nothing import DropNothing
from passes.freezing.rewrites.sums import FuseSums
from passes.freezing.rewrites.thresholds import UseThresholds
from passes.infra.compilation import Pass
from passes.infra.progress import Progress
from passes.tracing.regions import Trace

# compile and Pruner: understand the model once, plan (at every pruning step), then mask or lower
ANALYSIS: tuple[Pass, ...] = (Trace(), Selection())
GROUPING: tuple[Pass, ...] = (Importance(), Grouping())
PRUNING: tuple[Pass, ...] = (Pruning(),)
LOWERING: tuple[Pass, ...] = (Lowering(),)


def pruning_step(limit: float) -> tuple[Pass, ...]:
    """One step of a `Pruner`: plans made anew, no layer pruned beyond `limit`, and their masks."""
    return (*GROUPING, Pruning(limit), Masking())


def budget(progress: Progress) -> tuple[Pass, ...]:
    """After grouping: ratios that keep a budget, for which `PRUNING` prunes then; `progress` shows how far it is."""
    return (ErrorCurves(progress), Spending(progress))


# calibrate: whether the examples are like those of the training, then the kept weights solved again
INSPECTION: tuple[Pass, ...] = (SeeNorms(),)


def calibration(progress: Progress) -> tuple[Pass, ...]:
    """What solves the kept weights again; `progress` shows how far it is."""
    return (Calibration(progress),)


# freeze: an eval graph, said with as few passes over its tensors as possible
REWRITES: tuple[Pass, ...] = (
    DropNothing(), MakeRecipes(), FoldNorms(), FuseSums(), KeepNorms(), FuseActivations(),
    FoldConstants(), UseThresholds(), JoinConcatenations(), KeepLayouts(),
)  # fmt: skip
REWRITING: tuple[Pass, ...] = (RemoveUnread(), Trace(), Rewriting(REWRITES))
ARRANGING: tuple[Pass, ...] = (Stepping(), Placing(), Chaining())


def freezing(progress: Progress) -> tuple[Pass, ...]:
    """All that freezing does; `progress` shows how far it is."""
    return (*REWRITING, Forming(ARRANGING, progress), Comparison(REWRITES), Recording())
