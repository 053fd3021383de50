"""Writing to a disk that is full, reading or writing where one may not: one line instead of a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pixelgrow.errors import UserError

# What the user can mend, by the system's number of the error.
_FORBIDDEN = (errno.EACCES, errno.EPERM)
REMEDIES = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there")
    | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there or name another place")
    | dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "name another place")
)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn a full disk, or a place that cannot be written, into one line that names the file."""
    try:
        yield
    except SafetensorError as error:  # the library words the system's error: "... (os error 28)"
        for number in REMEDIES:
            if f"(os error {number})" in str(error):
                raise UserError(_cannot(what, str(error), number)) from error
        raise
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise UserError(_cannot(what, error.strerror or str(error), error.errno)) from error


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn a path that one may not look at, or that cannot be one (too long a name), into one line that names it."""
    try:
        yield
    except OSError as error:
        advice = "allow reading it, or name another place" if error.errno in _FORBIDDEN else "check the path"
        raise UserError(f"cannot read {what}: {error.strerror or error}; {advice}") from error


def _cannot(what: Path, reason: str, number: int) -> str:
    return (
        f"cannot write {what}: {reason}; what was saved before is kept: {REMEDIES[number]}, "
        "then run the same command again to go on"
    )
