"""Who reads which channels, and taking out what nobody reads."""

from passes.elimination.elimination import remove_unread_filters

__all__ = [
    "remove_unread_filters",
]
