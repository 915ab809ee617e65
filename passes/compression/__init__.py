"""The paper: which layers, which groups, what goes (eq. 5 to 14), masked or lowered."""

from passes.compression.grouping import GROUPS
from passes.compression.lowering import lower, lowered_copy
from passes.compression.masking import mask, masked_layer, unmask
from passes.compression.pruning import PLANS
from passes.compression.selection import REASONS, TARGETS

__all__ = [
    "GROUPS",
    "PLANS",
    "REASONS",
    "TARGETS",
    "lower",
    "lowered_copy",
    "mask",
    "masked_layer",
    "unmask",
]
