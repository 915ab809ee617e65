"""Programs that use sgfx as its users do."""
