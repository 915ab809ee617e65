"""The errors of the compiler, apart from Python's own for wrong types."""


class InputError(ValueError):
    """What the caller gave can't be compiled. The message names the layer or option, and the way out."""


class PassError(RuntimeError):
    """A pass failed or broke its own promise: a defect of the compiler (or of a pass plugged in), not of the input."""
