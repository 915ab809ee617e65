"""What the caller asked for, checked."""
