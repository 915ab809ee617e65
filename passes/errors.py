"""The errors of the compiler, apart from Python's own for wrong types."""


class InputError(ValueError):
    """What the caller gave can't be compiled. The message names the layer or option, and the way out."""


class PassError(RuntimeError):
    """A pass failed or broke its own promise: a defect of the compiler (or of a pass plugged in), not of the input."""


_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")


def let_memory_errors_pass(error: Exception) -> None:
    """Raise `error` again where memory ran out: no message about what was given to sgfx may stand in its place.

    torch says so by a class of its own for accelerators, and by a `RuntimeError` for the CPU.
    """
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _MEMORY)
    ):
        raise error
