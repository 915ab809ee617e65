"""A model as fx graphs with shapes; reads, never writes."""
