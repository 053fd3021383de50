"""One-line errors for files that cannot be written or read; atomic writes; what is wrong with a file of weights."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pixelgrow.errors import UserError

logger = logging.getLogger(__name__)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
# What the user can do, by the system's number of the error.
_REMEDIES = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there")
    | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there or name another place")
    | dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "name another place")
    | {errno.ENOENT: "it was moved or deleted meanwhile, or its place takes no files"}
)


class CannotWrite(UserError):
    """A file cannot be written: the disk is full or broken, or the place is forbidden or no folder."""


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Raise CannotWrite, naming the file, if it cannot be written."""
    try:
        yield
    except SafetensorError as error:  # the library gives the system's error as text: "... (os error 28)"
        found = re.search(r"[(]os error (\d+)[)]", str(error))
        if found is None:
            raise
        raise CannotWrite(_cannot(what, os.strerror(int(found[1])), int(found[1]))) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EEXIST and error.filename:  # a file in the place of the folder to be made
            reason = f"{error.filename} is a file, not a folder"
        elif error.errno == errno.ENOENT and error.filename and str(error.filename) != str(what):
            reason += f" ({error.filename})"
        raise CannotWrite(_cannot(what, reason, error.errno)) from error


@contextmanager
def going_on() -> Iterator[None]:
    """Inside it, a file that cannot be written cuts off work that is kept; the line then says how to go on."""
    try:
        yield
    except CannotWrite as error:
        raise UserError(f"{error}, then run the same command again: it goes on from what was saved") from error


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Raise UserError, naming the path, if it may not be read or cannot be a path (too long a name)."""
    try:
        yield
    except OSError as error:
        advice = "allow reading it, or name another place" if error.errno in _FORBIDDEN else "check the path"
        raise UserError(f"cannot read {what}: {error.strerror or error}; {advice}") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the block; it replaces `path` at the end.

    After a crash at any moment, of the machine too, `path` is either as before or complete. Raises UserError if the
    disk is full or the place cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            flush(part)
            part.replace(path)
            flush(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, values: Any) -> None:
    """Write JSON; see `atomic`."""
    with atomic(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if there is no file, or, with a warning, if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s)", path, type(error).__name__)
        return None


def _cannot(what: Path, reason: str, number: int | None) -> str:
    return f"cannot write {what}: {reason}; {_REMEDIES.get(number or 0, 'check the disk')}"


_POINTER = b"version https://git-lfs"
_OTHERS = {  # the first bytes of other kinds of files
    b"PK\x03\x04": "is a pickle or an archive, not safetensors",
    b"\x80": "is a pickle, not safetensors",
    b"<": "is a web page, not the weights",
}


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def fault_of(path: Path, remedy: str = "copy it again") -> str:
    """What is wrong with a safetensors file, and what to do: "is cut off (5 of 9 bytes): copy it again".

    The text goes after the file's name; "" if nothing is wrong. Only the file's size and header are checked.
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


def size_of(n: float) -> str:
    """A number of bytes as text: 12.3 MiB."""
    for power, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 2**power:
            return f"{n / 2**power:.1f} {suffix}"
    return f"{n:.0f} B"
