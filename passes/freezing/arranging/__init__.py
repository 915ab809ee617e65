"""Memory and calls around the chosen layers: who writes where, and what runs in one call."""
