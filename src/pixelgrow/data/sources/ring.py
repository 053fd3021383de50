"""Whole files from elsewhere in a folder of this machine, kept within a size by all processes that use it.

The file that was used longest ago goes first, never one that a process has open: who uses a file has a shared lock
(flock) on it, who fetches one a lock on its part. The system releases the locks of a process that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pixelgrow.writing import writing

_PAUSE = 0.05  # seconds between two looks whether another process has fetched a file
WHOLE, PART = ".tar", ".part"


class Ring:
    """The folder. `limit`: bytes of all its files, which is exceeded only where all of them are in use."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def find(self, name: str, size: int | None = None) -> int | None:
        """A descriptor of a file that is there, None if it is not. The file stays until the descriptor is closed.

        `size`: that it must have; another one is thrown away.
        """
        path = self.folder / f"{name}{WHOLE}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink and size in (None, os.fstat(fd).st_size):
            os.utime(fd, (time.time(), 0))  # the time of use; that of change says nothing
            return fd
        if os.fstat(fd).st_nlink:
            path.unlink(missing_ok=True)
        os.close(fd)
        return None

    def take(
        self, name: str, fetch: Callable[[Path], None], size: int | None = None, ahead: bool = False
    ) -> int | None:
        """A descriptor of a file as `find` has it, which is fetched first if it is not there.

        `fetch(part)` writes it, in one process at a time; what it raises is raised. `ahead`: the file is not needed
        yet: None if another process fetches it, or if there is no room beside what is in use. Raises `CannotWrite`.
        """
        path, part = self.folder / f"{name}{WHOLE}", self.folder / f"{name}.{size or 0}{PART}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            if (found := self.find(name, size)) is not None:
                return found
            with writing(part):
                fd = _owned(part)
            if fd is None:
                if ahead:
                    return None
                time.sleep(_PAUSE)
                continue
            try:
                if path.exists():
                    part.unlink()
                    continue
                if not self.make_room(size or 0, part) and ahead:
                    part.unlink()
                    return None
                fetch(part)
                with writing(path):
                    os.utime(part, (time.time(), 0))
                    part.rename(path)
                fcntl.flock(fd, fcntl.LOCK_SH)
                kept, fd = fd, -1
                return kept
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                if fd >= 0:
                    os.close(fd)

    def drop(self, name: str) -> None:
        """Have a file fetched anew when it is needed next."""
        (self.folder / f"{name}{WHOLE}").unlink(missing_ok=True)

    def make_room(self, need: int, but: Path | None = None) -> bool:
        """Remove what was used longest ago until `need` bytes have room; whether they have. `but`: it does not count.

        Files that are being fetched count with the size that they will have.
        """
        with self._alone():
            files = []
            for entry in os.scandir(self.folder):
                path = Path(entry.path)
                if path != but and path.suffix in (WHOLE, PART):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        size = int(path.stem.rpartition(".")[2]) if path.suffix == PART else 0
                        files.append((status.st_atime_ns, max(status.st_size, size), path))
            total = need + sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self.limit:
                    break
                fd = _owned(path, os.O_RDONLY)
                if fd is not None:
                    path.unlink()
                    os.close(fd)
                    total -= size
            return total <= self.limit

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = self.folder / "lock"
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _owned(path: Path, how: int = os.O_RDWR | os.O_CREAT) -> int | None:
    """A descriptor of a file with a lock for this process alone; None if another one has a lock, or it is gone."""
    try:
        fd = os.open(path, how | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None
