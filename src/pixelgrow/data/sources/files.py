"""Walk a folder and open untrusted files."""

import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from pixelgrow.data.images import DECODED, HEAD, OUR_FAULT, BadImage, format_of
from pixelgrow.data.sources.names import claims_image, form, is_hidden, text_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Reject = Callable[[str, str], None]  # takes note of a file (its key) and of what is wrong with it
MAX_FILE = 1 << 30  # bytes read at once
_MAX_DEPTH = 64


class Missing(BadImage):
    """There is no file of that name."""


class Span(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of its own; it owns and closes the descriptor."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length, self._at = fd, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        got = os.preadv(self._fd, [view], self._start + self._at) if view else 0
        self._at += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_regular(path: str | bytes, start: int = 0, length: int | None = None) -> BinaryIO:
    """Open a regular file, or `length` bytes of it from `start`, for reading piece by piece.

    Anything else (absent, unreadable, a folder, a pipe, a loop of links) raises `BadImage` with the reason.
    """
    fd, _ = _open_fd(path)
    return open(fd, "rb") if length is None else io.BufferedReader(Span(fd, start, length))


def read_regular(path: str | bytes, start: int = 0, length: int | None = None) -> bytes:
    """The bytes of a regular file, or `length` of them from `start`. Raises `BadImage` like `open_regular`."""
    fd, size = _open_fd(path)
    try:
        length = size if length is None else length
        if length > MAX_FILE:
            raise BadImage(f"{length} bytes, more than the limit of {MAX_FILE}")
        return os.pread(fd, length, start)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadImage((error.strerror or str(error)).lower()) from None
    finally:
        os.close(fd)


def _open_fd(path: str | bytes) -> tuple[int, int]:
    """(descriptor, size in bytes) of a regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # O_NONBLOCK: a pipe must not block us
    except FileNotFoundError:
        if os.path.islink(path):
            raise BadImage("link to a file that is absent") from None
        raise Missing("no such file") from None
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadImage((error.strerror or str(error)).lower()) from None
    except ValueError as error:  # a NUL in the name
        raise BadImage(str(error)) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise BadImage("is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return fd, status.st_size


def format_at(path: str | bytes, start: int = 0) -> str:
    """What the bytes of a file from `start` on are (`images.format_of`); "" if it cannot be read."""
    try:
        return format_of(read_regular(path, start, HEAD))
    except BadImage:
        return ""


def is_image(path: bytes) -> bool:
    """Whether a file is an image by its name or, if that says nothing, by its bytes."""
    return claims_image(text_of(os.path.basename(path))) or format_at(path) in DECODED


def walk(root: bytes, reject: Reject) -> Iterator[tuple[bytes, list[bytes]]]:
    """(folder relative to `root`: b"" or ending in a slash, its visible file names), depth first, both in order of NFC.

    Links are followed. Loops of links, unreadable folders and folders named like an image are rejected.
    """
    yield from _walk(root, b"", (), reject)


def in_order(names: list[bytes]) -> list[bytes]:
    """File names sorted by their NFC form."""
    return sorted(names, key=lambda name: (form(text_of(name)), name))


def key_of(name: bytes) -> str:
    """A path as text in NFC: a sample's key."""
    return form(text_of(name))


def _walk(
    root: bytes, folder: bytes, above: tuple[tuple[int, int], ...], reject: Reject
) -> Iterator[tuple[bytes, list[bytes]]]:
    files: list[bytes] = []
    folders: list[bytes] = []
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in above or len(above) > _MAX_DEPTH:
            reject(key_of(folder[:-1]), "loop of links")
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(text_of(entry.name)):
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a loop of links: opening it will say so
                    is_folder = False
                (folders if is_folder else files).append(entry.name)
    except OSError as error:
        if error.errno in OUR_FAULT or not folder:
            raise
        reject(key_of(folder[:-1]), (error.strerror or str(error)).lower())
        return
    yield folder, in_order(files)
    for name in in_order(folders):
        if claims_image(text_of(name)):
            reject(key_of(folder + name), "is a directory")
        else:
            yield from _walk(root, folder + name + b"/", (*above, (status.st_dev, status.st_ino)), reject)
