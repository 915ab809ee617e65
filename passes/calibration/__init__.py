"""The kept weights solved again on unlabelled data, and ratios under a budget."""

from passes.calibration.budget.allotment import BUDGET, FIT, Budget, Fit
from passes.calibration.budget.shares import ShareBudget
from passes.calibration.calibrating import DENSE, SEEN_NORMS, UNCALIBRATED
from passes.calibration.data import EXAMPLES, Arguments, example_count, read_examples, single_image
from passes.calibration.foreign_data import SeenNorm
from passes.calibration.output_distance import distance, floating_tensors, relative_error, shapes, variance_of

__all__ = [
    "BUDGET",
    "DENSE",
    "EXAMPLES",
    "FIT",
    "SEEN_NORMS",
    "UNCALIBRATED",
    "Arguments",
    "Budget",
    "Fit",
    "SeenNorm",
    "ShareBudget",
    "distance",
    "example_count",
    "floating_tensors",
    "read_examples",
    "relative_error",
    "shapes",
    "single_image",
    "variance_of",
]
