"""The commands of `sgfx`: one file each, and what they share."""
