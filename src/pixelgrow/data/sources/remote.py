"""Files of other machines by their URLs, through fsspec: whole, or some bytes of them; tried again when a try fails.

Credentials and addresses of servers are those of fsspec and its libraries, from their environment variables and files.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pixelgrow.data.sources.files import Missing
from pixelgrow.errors import UserError
from pixelgrow.writing import writing

T = TypeVar("T")
PAUSES = [1.0, 2.0, 4.0, 8.0, 16.0]  # seconds between tries
_SILENCE = 60.0  # seconds without a byte after which a connection is given up
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
logger = logging.getLogger(__name__)


class Refused(UserError):
    """The server does not give a file to who we are."""


class CutOff(Exception):
    """Fewer bytes came than there are."""


def is_url(path: str) -> bool:
    """Whether a source is on another machine, or wherever fsspec looks."""
    return "://" in path


def fetch(url: str, path: Path, about: Callable[[int], object] = lambda size: None) -> None:
    """Write a whole file to `path`. `about`: is told its size before anything is written, if the server says it.

    Raises `Missing` if there is none of that name, and `UserError` for what the user must set right, or if it cannot be
    had even after several tries.
    """
    from fsspec.callbacks import Callback

    class Size(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            self.size = size
            if size is not None:
                about(size)

    def once(files: Any) -> None:
        said = Size()
        files.get_file(url, str(path), callback=said)
        if said.size is not None and path.stat().st_size != said.size:
            raise CutOff(f"{path.stat().st_size:,} of {said.size:,} bytes came")

    _tried(url, once)


def read(url: str, start: int, length: int) -> bytes:
    """Bytes of a file; other bytes, and more of them, if the server knows no ranges. Raises as `fetch` does."""

    def once(files: Any) -> bytes:
        data: bytes = files.cat_file(url, start=start, end=start + length)
        if len(data) < length:
            raise CutOff(f"{len(data):,} of {length:,} bytes came")
        return data

    return _tried(url, once)


def matching(pattern: str) -> list[str]:
    """The URLs that a pattern with * stands for, sorted. Raises `UserError`."""
    return _tried(pattern, lambda files: sorted(files.unstrip_protocol(path) for path in files.glob(pattern)))


def _tried(url: str, once: Callable[[Any], T]) -> T:
    for pause in [*PAUSES, None]:
        try:
            return once(_file_system(url))
        except UserError:
            raise
        except FileNotFoundError:
            raise Missing("no such file") from None
        except ImportError as error:
            raise UserError(f"{url}: {_one_line(error)}: pip install 'pixelgrow[stream]'") from error
        except Exception as error:  # each protocol's library has its own
            if isinstance(error, OSError) and error.errno in _DISK and error.filename and not is_url(error.filename):
                with writing(Path(error.filename)):
                    raise
            status = getattr(error, "status", None)
            if status == 410:
                raise Missing("no such file") from None
            if isinstance(error, PermissionError) or status in (401, 403):
                said = f"status {status}" if status else _one_line(error)
                raise Refused(
                    f"{url}: the server refuses it ({said}): check the address, and the credentials in the environment"
                ) from error
            if reason := _hopeless(error, status):
                raise UserError(f"{url}: {reason}") from error
            if pause is None:
                raise UserError(
                    f"{url}: cannot be read, after {len(PAUSES) + 1} tries ({_one_line(error)}); run the same command "
                    "again when the server answers"
                ) from error
            logger.info("%s: %s; trying again in %g seconds", url, _one_line(error), pause)
            time.sleep(pause)
    raise AssertionError


def _file_system(url: str) -> Any:
    """fsspec's file system for a URL; it keeps one for each process and thread."""
    from fsspec.core import url_to_fs

    settings: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # Without it, aiohttp would end every download after five minutes.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE / 2, sock_read=_SILENCE)
        settings["client_kwargs"] = {"timeout": patience}
    try:
        return url_to_fs(url, **settings)[0]
    except ValueError as error:
        raise UserError(f"{url}: {_one_line(error)}; expected https://, s3:// or another protocol of fsspec") from error


def _hopeless(error: Exception, status: int | None) -> str:
    """Why another try would end in the same way, and what to do; "" if it might not."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError"):
        return f"{_one_line(error)}: set them as for boto3 (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)"
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return f"the server answers with status {status}: check the address"
    inner: BaseException | None = error
    while inner is not None:
        for one in (inner, getattr(inner, "os_error", None)):
            if isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME:
                return "there is no host of that name: check the address, and the network"
        inner = inner.__cause__ or inner.__context__
    if type(error).__name__ == "InvalidURL":
        return "it is no address: expected https://host/path.tar"
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
