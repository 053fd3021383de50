"""The exception for users' mistakes, and a test of other exceptions for out-of-memory."""


class UserError(ValueError):
    """A user's mistake in one line: what was got, what was expected, what to do.

    The command line prints only the message and exits with status 2.
    """


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that torch, on any device, or Python could not allocate memory."""
    words = ("can't allocate memory", "not enough memory")  # torch's CPU allocator raises a plain RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
    )
