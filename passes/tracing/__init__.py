"""A model as fx graphs with shapes; reads, never writes."""

from passes.tracing.python_names import rename_in_program
from passes.tracing.regions import REGIONS

__all__ = [
    "REGIONS",
    "rename_in_program",
]
