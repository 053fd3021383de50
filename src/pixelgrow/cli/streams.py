"""Standard streams that are closed, full or read by nobody.

Results go to standard output: the command fails in one line if they cannot be written. Messages go to standard error:
they are lost if they cannot be written, and a training goes on.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Unwritable(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")
        self.unread = error.errno == errno.EPIPE  # a reader such as `head` has enough


class _Output(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            raise Unwritable(error) from error
        if written is None:  # a reader that keeps others waiting, and a stream that does not wait
            raise Unwritable(BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
        return written


class _Messages(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size
        except OSError:
            return size


def secure_streams() -> None:
    """Make `sys.stdout` raise `Unwritable` where it cannot be written, and `sys.stderr` drop what cannot be written.

    Streams that were closed lead to the null device: the next file to be opened would get their numbers. Text that the
    streams' encoding lacks, as names of files may be, is escaped. A stream that is not the process's own stays.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(sys.stdout, _Output, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, _Messages, 2)


def _text(was: TextIO | None, kind: type[io.FileIO], fd: int) -> TextIO:
    if was is not None:
        was.flush()
    raw = kind(os.devnull if was is None else fd, "w", closefd=was is None)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if was is None else was.encoding,
        errors="backslashreplace",
        line_buffering=fd == 2 or raw.isatty(),
    )


def discard_output() -> None:
    """Send what is left of standard output to the null device, since Python writes it when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
