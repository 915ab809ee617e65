"""What became of each layer, in numbers."""
