"""Compiled models in files: written whole, read whole, checked, never unpickled."""
