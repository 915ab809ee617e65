"""The layers that the compiler emits: masked (between pruning steps) and grouped (what `compile` returns)."""
