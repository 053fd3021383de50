"""The one exception that means "you can fix this", and which of the others mean that memory ran out."""


class UserError(ValueError):
    """A user's mistake, told in one line: what was got, what was expected, what to do.

    The command line prints the message alone and exits with status 2.
    """


def out_of_memory(error: Exception) -> bool:
    """Whether torch, on any device, or Python could not get the memory that was asked for."""
    words = ("can't allocate memory", "not enough memory")  # of torch's allocator on a CPU, which has no class for it
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
    )
