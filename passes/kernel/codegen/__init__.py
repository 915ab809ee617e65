"""Machine code for this machine: vectors, activations, micro-kernels, compiled and kept on disk."""
