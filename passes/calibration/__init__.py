"""The kept weights solved again on unlabelled data, and ratios under a budget."""
