"""Whether a frozen form computes what the model does, and which layer is the first that does not."""
