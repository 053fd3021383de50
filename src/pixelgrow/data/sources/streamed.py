"""Tar shards of other machines (`remote`): whole ones are fetched for training as it comes to them, and soon removed.

A process fetches what `hold` names, and what comes next in a thread of its own. Samples of other shards, such as those
held out, are read by their bytes alone. The index is made in one pass over all shards, if none lies beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pixelgrow.data.images import OUR_FAULT, BadImage
from pixelgrow.data.sources import remote
from pixelgrow.data.sources.base import Lanes
from pixelgrow.data.sources.files import Missing
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.keeping import FOLDER, Elsewhere, cache_folder, cached_places, index_of
from pixelgrow.data.sources.names import suffix_of
from pixelgrow.data.sources.patterns import expanded
from pixelgrow.data.sources.ring import WHOLE, Ring
from pixelgrow.data.sources.shards import Part, Shard, scan_shard
from pixelgrow.data.sources.tars import TarShards
from pixelgrow.errors import UserError

CACHE = 50.0  # GB of shards on this machine


class StreamedShards(TarShards):
    """One .tar file by its URL, or several by a pattern with braces or *.

    `cache`: GB that shards on this machine may take. Samples, their order and the fingerprint are those of the same
    shards in a folder that is read in lanes.
    """

    lanes: Lanes | None = Lanes()

    def __init__(self, url: str, cache: float = CACHE) -> None:
        FileSource.__init__(self, url)
        folder = cache_folder()
        if folder is None:
            raise UserError(f"{url}: there is no place for its shards: set XDG_CACHE_HOME to a folder")
        self.cache = cache
        self._ring = Ring(folder / "shards", int(cache * 1e9))
        self._base, names = shards_at(url)
        self._root = os.fsencode(self._base)
        alone = f"{self._base}/{names[0]}" == url
        what = names[0] if alone else f"shards-{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}"
        self._beside = f"{self._base}/{FOLDER}/{names[0] if alone else 'shards'}.index"
        self._places = cached_places(self._root, what)
        shards = [Shard(os.fsencode(f"{self._base}/{name}"), os.fsencode(name), alone) for name in names]
        self._index = index_of(shards, url, self._places, Elsewhere(self._scan, self._publish))
        self._wanted: _Wanted | None = None
        self._finish(self._facts(), self._index)

    def advice(self, step: int, parts: int, here: float) -> list[str]:
        """What makes training fetch more than it must. `step`: images of a step. `parts`: micro-batches of a step, of
        which this machine takes the share `here`."""
        assert self.lanes is not None
        count = math.gcd(self.lanes.count, step)
        need = 2 * self.lanes.window * math.ceil(count * here) * int(self._index.stamps[:, 0].max()) / 1e9
        said = []
        if here < 1 and count % parts:
            said.append(
                f"{self.name}: {count} lanes for {parts} micro-batches: several machines fetch the same shards; in a "
                f"new run, lanes: {parts} avoids it"
            )
        if need > self.cache:
            said.append(
                f"{self.name}: {self.cache:g} GB (cache:) have no room for the shards in use and those that come next, "
                f"up to {need:.3g} GB: raise it, or training waits for shards"
            )
        return said

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_wanted": None}

    def _publish(self, path: Path) -> bool:
        """Fetch the index that lies beside the shards; whether there is one."""
        part = path.with_name(f".{path.name}.part")
        try:
            remote.fetch(self._beside, part)
        except (Missing, remote.Refused):
            return False
        except UserError as error:  # what is wrong with a server is so for the shards too, which the user knows
            raise UserError(str(error).replace(self._beside, self.name)) from error
        part.replace(path)
        return True

    def _scan(self, shard: Shard) -> Part:
        """Fetch a shard and scan it; one that is not there is damaged."""
        url = os.fsdecode(shard.path)
        with contextlib.ExitStack() as stack:
            self._ring.drop(_name(url))  # it may be older than the index
            with contextlib.suppress(Missing):
                fd = self._ring.take(_name(url), lambda part: self._fetch(url, part))
                assert fd is not None
                stack.callback(os.close, fd)
            path = os.fspath(self._ring.folder / f"{_name(url)}{WHOLE}")
            try:
                return scan_shard(Shard(os.fsencode(path), shard.name, shard.alone))
            except UserError as error:
                raise UserError(str(error).replace(path, url)) from None

    def _fetch(self, url: str, part: Path) -> None:
        remote.fetch(url, part, lambda size: self._ring.make_room(size, part))

    # --- samples ------------------------------------------------------------------------------------------------------

    def hold(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Fetch whole shards: those that are needed now when they are read, these and the next ones in a thread.

        Without any, what is too much for the cache goes.
        """
        self._of_process().want(now, ahead)
        if not now and self._ring.folder.exists():
            self._ring.make_room(0)

    def read(self, i: int) -> bytes:
        row = self._index.row(i)
        url = self.url(row.shard)
        data = self._of_process().read(row.shard, row.start, row.length)
        try:
            self._check(i, row, data, os.fsencode(url))
        except UserError:  # of a shard that was kept from before it changed, and the index with it, or it changed now
            self._ring.drop(_name(url))
            self._of_process().forget(row.shard)
            data = self._of_process().read(row.shard, row.start, row.length)
            self._check(i, row, data, os.fsencode(url))
        return data

    def url(self, shard: int) -> str:
        """Where a shard is."""
        return f"{self._base}/{os.fsdecode(self._index.names[shard])}"

    def take(self, shard: int, ahead: bool = False) -> int | None:
        """See `Ring.take`. Raises `Missing`, and `UserError` if it is another one than was indexed."""
        url, size = self.url(shard), int(self._index.stamps[shard, 0])

        def fetch(part: Path) -> None:
            self._fetch(url, part)
            if (found := part.stat().st_size) != size:
                raise UserError(
                    f"{url}: has {found:,} bytes, and had {size:,} when its index was made: put it back as it was, or "
                    f"delete {self._index.path} to make the index anew, for a run of another name"
                )

        return self._ring.take(_name(url), fetch, size, ahead)

    def find(self, shard: int) -> int | None:
        """See `Ring.find`."""
        return self._ring.find(_name(self.url(shard)), int(self._index.stamps[shard, 0]))

    def _of_process(self) -> _Wanted:
        if self._wanted is None or self._wanted.process != os.getpid():
            self._wanted = _Wanted(self)
        return self._wanted


class _Wanted:
    """The shards that this process has open, and those that it will need."""

    def __init__(self, source: StreamedShards) -> None:
        self.process = os.getpid()
        self._source = source
        self._shards: tuple[int, ...] = ()  # wanted ones, those that are needed first before the others
        self._open: dict[int, int] = {}  # descriptors
        self._gone: set[int] = set()
        self._todo: list[int] = []
        self._ranges = True  # whether the server sends parts of files
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def want(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Close all shards but these, and begin to fetch them."""
        wanted = (*now, *ahead)
        if wanted == self._shards:
            return
        with self._changed:
            self._shards = wanted
            for shard in self._open.keys() - set(wanted):
                os.close(self._open.pop(shard))
            self._todo = [shard for shard in wanted if shard not in self._open]
            self._changed.notify()
        if self._todo and self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, daemon=True)
            self._thread.start()

    def forget(self, shard: int) -> None:
        """Close a shard."""
        with self._changed:
            if shard in self._open:
                os.close(self._open.pop(shard))

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._todo:
                    self._changed.wait()
                shard = self._todo.pop(0)
            with contextlib.suppress(UserError, BadImage):  # who reads it meets the same
                self._descriptor(shard, ahead=True)

    def _descriptor(self, shard: int, ahead: bool = False) -> int | None:
        """The open shard, fetched first if need be. `ahead`: as of `Ring.take`."""
        with self._changed:
            if shard in self._open:
                return self._open[shard]
        fd = self._take(shard, ahead)
        with self._changed:
            if fd is not None and (shard in self._open or shard not in self._shards):
                os.close(fd)
                return self._open.get(shard)
            if fd is not None:
                self._open[shard] = fd
        return fd

    def _take(self, shard: int, ahead: bool = False) -> int | None:
        if shard not in self._gone:
            with contextlib.suppress(Missing):
                return self._source.take(shard, ahead)
            self._gone.add(shard)
        raise _gone()

    def read(self, shard: int, start: int, length: int) -> bytes:
        """Bytes of a shard. Raises `BadImage` if it is gone."""
        if shard in self._shards:
            fd = self._descriptor(shard)
            assert fd is not None
            return _bytes(fd, start, length)
        fd = self._source.find(shard)
        if fd is None and self._ranges and shard not in self._gone:
            try:
                data = remote.read(self._source.url(shard), start, length)
            except Missing:
                self._gone.add(shard)
                raise _gone() from None
            if len(data) == length:
                return data
            self._ranges = False
        fd = fd or self._take(shard)
        assert fd is not None
        try:
            return _bytes(fd, start, length)
        finally:
            os.close(fd)


def _gone() -> Missing:
    return Missing("its shard is gone: no such file")


def _bytes(fd: int, start: int, length: int) -> bytes:
    try:
        return os.pread(fd, length, start)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise BadImage((error.strerror or str(error)).lower()) from None


def _name(url: str) -> str:
    """A URL as the name of a file."""
    return hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def shards_at(url: str) -> tuple[str, list[str]]:
    """The folder of the shards that a URL means, and their names in it in order. Raises `UserError`."""
    urls: dict[str, None] = {}
    for one in expanded(url):
        urls |= dict.fromkeys(remote.matching(one) if "*" in one else [one])
    if not urls:
        raise UserError(f"{url}: no file has such a name; expected tar shards")
    other = next((one for one in urls if suffix_of(one) != ".tar"), None)
    if other is not None:
        what = "" if other == url else f"stands for {other}; "
        raise UserError(f"{url}: {what}expected plain .tar files: https://host/shards-{{0000..0999}}.tar")
    levels = zip(*(one.split("/")[:-1] for one in urls), strict=False)
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)
    base = "/".join(parts[0] for parts in alike)
    return base, [one[len(base) + 1 :] for one in urls]
