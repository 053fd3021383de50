"""Walking a folder and opening files that nobody vouches for."""

import io
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from pixelgrow.data.images import OUR_FAULT, BadImage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

IMAGE_SUFFIXES = {b".jpg", b".jpeg", b".png", b".webp"}
OTHER_IMAGE_SUFFIXES = {
    *(b".gif", b".bmp", b".tif", b".tiff", b".heic", b".heif", b".avif", b".jp2", b".jxl", b".psd", b".svg"),
    *(b".ppm", b".pgm", b".tga", b".ico", b".jfif", b".raw", b".dng", b".cr2", b".nef", b".exr"),
}
MAX_FILE = 1 << 30  # bytes read at once
_MAX_DEPTH = 64


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
        raise BadImage("link to a file that is absent" if os.path.islink(path) else "no such file") from None
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


def suffix(name: bytes) -> bytes:
    """The lower-case suffix of a file name, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_image(name: bytes) -> bool:
    """Whether a name claims to be an image that we decode."""
    return suffix(name) in IMAGE_SUFFIXES


def is_other_image(name: bytes) -> bool:
    """Whether a name claims to be an image of a format that we do not decode."""
    return suffix(name) in OTHER_IMAGE_SUFFIXES


def contains(names: list[bytes], name: bytes) -> bool:
    """Whether a sorted list holds a name."""
    at = bisect_left(names, name)
    return at < len(names) and names[at] == name


def has_image_named(names: list[bytes], stem: bytes) -> bool:
    """Whether a sorted list holds an image of any format with this stem."""
    at = bisect_left(names, stem + b".")
    while at < len(names) and names[at].startswith(stem + b"."):
        if os.path.splitext(names[at])[0] == stem and (is_image(names[at]) or is_other_image(names[at])):
            return True
        at += 1
    return False


def walk(root: bytes, bad: dict[str, str]) -> Iterator[tuple[bytes, list[bytes]]]:
    """(folder relative to `root`: b"" or ending in a slash, its sorted visible file names), depth first, sorted.

    Links are followed. Loops of links, unreadable folders and folders named like an image go to `bad` (key -> reason).
    """
    yield from _walk(root, b"", (), bad)


def holds_images(root: str) -> bool:
    """Whether a folder, or one in it, holds an image that we decode."""
    return any(is_image(name) for _, names in walk(os.fsencode(root), {}) for name in names)


def _walk(
    root: bytes, folder: bytes, above: tuple[tuple[int, int], ...], bad: dict[str, str]
) -> Iterator[tuple[bytes, list[bytes]]]:
    files: list[bytes] = []
    folders: list[bytes] = []
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in above or len(above) > _MAX_DEPTH:
            bad[os.fsdecode(folder[:-1])] = "loop of links"
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a loop of links: opening it will tell
                    is_folder = False
                (folders if is_folder else files).append(entry.name)
    except OSError as error:
        if error.errno in OUR_FAULT or not folder:
            raise
        bad[os.fsdecode(folder[:-1])] = (error.strerror or str(error)).lower()
        return
    files.sort()
    yield folder, files
    for name in sorted(folders):
        if is_image(name) or is_other_image(name):
            bad[os.fsdecode(folder + name)] = "is a directory"
        else:
            yield from _walk(root, folder + name + b"/", (*above, (status.st_dev, status.st_ino)), bad)
