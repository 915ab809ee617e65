"""What a pass is, and how a list of them is run."""
