"""The compiled loops, and torch's own threads to run them."""
