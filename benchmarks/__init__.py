"""Measured comparisons. Ratios inside one run, medians; the machines are noisy."""
