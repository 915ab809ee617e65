"""Budgets: a ratio for each layer, so that the network as a whole keeps a share of its cost at the least error."""
