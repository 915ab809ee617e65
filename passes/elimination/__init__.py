"""Who reads which channels, and taking out what nobody reads."""
