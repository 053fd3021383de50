"""Files that cannot be written or read: one line instead of a traceback, and what is wrong with a file of weights."""

from __future__ import annotations

import errno
import json
import struct
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


_POINTER = b"version https://git-lfs"
_OTHERS = {  # how files of other kinds begin
    b"PK\x03\x04": "is a pickle or an archive, not safetensors",
    b"\x80": "is a pickle, not safetensors",
    b"<": "is a web page, not the weights",
}


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer in the place of the file that it stands for."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def fault_of(path: Path, remedy: str = "copy it again") -> str:
    """What is wrong with a safetensors file, and what to do: "is cut off (5 of 9 bytes): copy it again".

    To be put after the file's name. Looks at the file's size and header alone; "" if they are sound.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
            length = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
            file.seek(8)
            header = file.read(length) if length < size else b""
    except FileNotFoundError:
        return f"is missing: {remedy}"
    except OSError as error:
        return f"cannot be read ({error.strerror}): allow reading it"
    if head == _POINTER:
        return "is a Git LFS pointer, not the weights: run git lfs pull"
    if not size:
        return f"is empty: {remedy}"
    for start, what in _OTHERS.items():
        if head.startswith(start) and head[8:9] != b"{":
            return f"{what}: {remedy}"
    if size >= 9 and head[8:9] != b"{":
        return f"is no safetensors file: {remedy}"
    if 8 + length > size:
        return f"is cut off (its header alone is longer than its {size:,} bytes): {remedy}"
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return f"is damaged (its header cannot be read): {remedy}"
    if size < whole:
        return f"is cut off ({size:,} of {whole:,} bytes): {remedy}"
    return f"is damaged ({size:,} bytes instead of {whole:,}): {remedy}" if size > whole else ""
