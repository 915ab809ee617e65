"""The compiler: passes over torch.fx graphs, and the layers they emit.

What `sgfx` takes from a room stands in the room's ``__init__``; within `passes`, modules import from each other.
"""
