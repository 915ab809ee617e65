"""Rewrites of an eval graph: what is computed, said with as few passes over tensors as possible."""
