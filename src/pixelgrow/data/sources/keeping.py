"""Where the index of a source of shards is kept, and how it is brought up to date.

It lies in a hidden folder beside the shards, or in the user's cache where that cannot be written. A shard is scanned if
the index has none of its name, size and time of change. What is scanned goes to a journal beside the index, so that a
scan that was interrupted goes on; then the index is written anew and replaces the old one. Who begins while another
process scans waits for it.

Shards of other machines are not looked at when a run starts: what their index says holds, and a shard that is not in it
is fetched and scanned, after the index that may lie beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from pixelgrow.data.sources.shards import Part, Shard, scan_shard, stamp_of
from pixelgrow.data.sources.stored import FIELDS, Damaged, Found, Journal, Stored, write
from pixelgrow.data.workers import Workers
from pixelgrow.errors import UserError
from pixelgrow.writing import CannotWrite, atomic, writing

FOLDER = ".pixelgrow"  # beside the shards
_ALONE = 1 << 26  # bytes of shards that are scanned faster without further processes
_MOST = 32  # processes that scan
_FETCHING = 8  # processes that fetch and scan, at least
_PAUSE = 15.0  # seconds between two lines of progress
_KEPT = 1 << 16  # least hashes of keys that are kept; where there are no more samples, none are
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Elsewhere:
    """How shards of other machines are indexed: `scan` fetches and scans one; `publish` writes the index that lies
    beside them to a path, and says whether there is one."""

    scan: Callable[[Shard], Part]
    publish: Callable[[Path], bool]


def cache_folder() -> Path | None:
    """The user's cache; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "pixelgrow") if os.path.isabs(cache) else None


def cached_places(folder: bytes, what: str) -> list[Path]:
    """Where in the user's cache the index of the shards `what` in a folder may be kept."""
    cache = cache_folder()
    hashed = hashlib.blake2b(folder + b"\0" + os.fsencode(what), digest_size=16).hexdigest()
    return [cache / "index" / hashed / f"{what}.index"] if cache else []


def places_of(root: bytes, what: str) -> list[Path]:
    """Where the index of the shards `what` in the folder `root` may be kept, the best place first."""
    folder = os.path.realpath(root)
    return [Path(os.fsdecode(folder), FOLDER, f"{what}.index"), *cached_places(folder, what)]


def index_of(shards: Sequence[Shard], name: str, places: Sequence[Path], elsewhere: Elsewhere | None = None) -> Stored:
    """The index of shards as they are now. `name`: of the source, for messages. Raises `UserError`."""
    with contextlib.closing(_Keeper(shards, name, elsewhere)) as keeper:
        return _kept(keeper, name, places)


def _kept(keeper: _Keeper, name: str, places: Sequence[Path]) -> Stored:
    for place in places:
        found = keeper.open(place)
        if found is not None and keeper.fits(found):
            return found
    for place in places:
        try:
            return keeper.update(place)
        except CannotWrite as error:
            log.info("%s: its index goes elsewhere: %s", name, str(error))  # whose frames would keep the index alive
    folder = Path(tempfile.mkdtemp(prefix="pixelgrow-"))
    try:
        found = keeper.update(folder / "index")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    log.warning("%s: its index can be written nowhere, so that every start scans it again", name)
    return found


class _Keeper:
    def __init__(self, shards: Sequence[Shard], name: str, elsewhere: Elsewhere | None) -> None:
        self._shards, self._name, self._elsewhere = shards, name, elsewhere
        stamps = [] if elsewhere else [stamp_of(shard.path) for shard in shards]
        self._now = np.array(stamps, np.int64).reshape(-1, 2)  # size and time of change of each shard that is here
        self._names = [shard.name for shard in shards]
        self._indices: list[Stored] = []
        self._journals: list[Journal] = []

    def close(self) -> None:
        for journal in self._journals:
            journal.close()

    def open(self, place: Path) -> Stored | None:
        """The index at a place; None if there is none, or a damaged one, which is said."""
        if not os.path.exists(place):  # which is False where it may not be looked for, too
            return None
        try:
            found = Stored(place)
        except Damaged as error:
            log.warning("%s: the index of %s is not used: %s; it is written anew", place, self._name, error)
            return None
        self._indices.append(found)
        return found

    def fits(self, index: Stored) -> bool:
        """Whether an index is that of the shards as they are."""
        if index.names != self._names:
            return False
        return bool((index.stamps[:, 1] >= 0 if self._elsewhere else index.stamps[:, :2] == self._now).all())

    def update(self, place: Path) -> Stored:
        """Write the index to a place. Raises `CannotWrite`; what was scanned until then is used at the next place."""
        with _locked(place, self._name):
            found = self.open(place)  # another process may have written it
            if found is None and self._elsewhere and self._elsewhere.publish(place):
                found = self.open(place)
            if found is not None and self.fits(found):
                return found
            journal = Journal(place.with_name(f"{place.name}.journal"))
            self._journals.append(journal)
            parts = self._parts(journal)
            found = next((index for index in self._indices if self._same(index, parts)), None)
            if found is None:
                write(place, parts)
                found = Stored(place)
                for old in place.parent.glob(f"{place.name}.*.keys"):
                    old.unlink()
            journal.path.unlink()
        return found

    def _parts(self, journal: Journal) -> list[Found]:
        """The parts of all shards in order; those that are not known are scanned into the journal."""
        known: dict[bytes, Found] = {}
        for index in self._indices:
            known |= {name: index.found(shard) for shard, name in enumerate(index.names)}
        for other in self._journals:
            known |= other.found
        todo = [number for number, name in enumerate(self._names) if not self._holds(number, known.get(name))]
        if 0 < len(todo) < len(self._names):
            log.info("%s: %d of %d shards are new or have changed", self._name, len(todo), len(self._names))
        with contextlib.closing(self._scanned([self._shards[number] for number in todo], self._bytes(todo))) as scanned:
            progress = _Progress(self._name, len(todo))
            for new in scanned:
                known[new.name] = journal.add(new)
                progress.say(len(new.clear))
        return [known[name] for name in self._names]

    def _holds(self, number: int, part: Found | None) -> bool:
        """Whether a part is what a scan of a shard would find."""
        if part is None or self._elsewhere:
            return part is not None and part.time >= 0
        return [part.size, part.time] == self._now[number].tolist()

    def _bytes(self, todo: list[int]) -> int:
        return int(self._now[todo, 0].sum()) if todo and not self._elsewhere else 0

    def _scanned(self, shards: Sequence[Shard], size: int) -> Generator[Part, None, None]:
        """The parts of shards, in order. `size`: in bytes, of all."""
        one = self._elsewhere.scan if self._elsewhere else scan_shard

        def scan(number: int) -> Part | UserError:
            if number >= len(shards):  # a task ahead of the end
                return UserError("")
            try:
                return one(shards[number])
            except UserError as error:
                return error
            except OSError as error:
                path = os.fsdecode(shards[number].path)
                return UserError(f"{path}: cannot be read: {error.strerror or error}")

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(max(cores, _FETCHING) if self._elsewhere else cores, len(shards), _MOST)
        here = (scan(number) for number in itertools.count())
        parallel = count > 1 and (self._elsewhere or size > _ALONE)
        with contextlib.closing(Workers(scan, itertools.count(), count) if parallel else here) as results:
            for result in itertools.islice(results, len(shards)):
                if isinstance(result, UserError):
                    raise result
                yield result

    def _same(self, index: Stored, parts: list[Found]) -> bool:
        """Whether an index has these parts to the byte."""
        return index.names == self._names and all(
            new == old or [new.read(f) for f in range(len(FIELDS))] == [old.read(f) for f in range(len(FIELDS))]
            for new, old in zip(parts, map(index.found, range(len(parts))), strict=True)
        )


class _Progress:
    def __init__(self, name: str, shards: int) -> None:
        self._name, self._shards, self._done, self._images = name, shards, 0, 0
        self._began = self._said = time.monotonic()

    def say(self, images: int) -> None:
        """One more shard is done. Says so now and then."""
        self._done, self._images, now = self._done + 1, self._images + images, time.monotonic()
        if now - self._said > _PAUSE:
            self._said, took = now, now - self._began
            log.info(
                "%s: indexing: %s of %s shards, %s images, %.3g a second, about %.0f min left",
                *(self._name, f"{self._done:,}", f"{self._shards:,}", f"{self._images:,}", self._images / took),
                took * (self._shards / self._done - 1) / 60,
            )


@contextlib.contextmanager
def _locked(place: Path, name: str) -> Iterator[None]:
    """Alone at a place. Raises `CannotWrite`."""
    lock = FileLock(place.with_name(f"{place.name}.lock"))
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s: waiting for another process that writes its index", name)
                lock.acquire()
        except NotImplementedError:
            raise CannotWrite(f"cannot write {place}: its file system has no locks") from None
    try:
        yield
    finally:
        lock.release()


def kept_hashes(index: Stored, seed: int, count: int, places: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """`base.least_of` the samples of an index: read from a file beside it, which is written first if there is none."""
    from pixelgrow.data.sources.base import least_hashes

    if len(index) <= _KEPT:
        return least_hashes(index.keys(), seed, count)
    files = [place.with_name(f"{place.name}.{index.digest[:16]}.{seed}.keys") for place in places]
    about = f"{index.digest} {seed} ".encode()
    for file in files:
        with contextlib.suppress(OSError):
            raw = file.read_bytes()
            found = np.frombuffer(raw[16 : len(raw) // 16 * 16], np.dtype([("hash", "<u8"), ("number", "<i8")]))
            if len(found) >= count and raw[:16] == hashlib.blake2b(about + raw[16:], digest_size=16).digest():
                return found["hash"].copy(), found["number"].copy()
    log.info("%s: hashing %s keys, once, to hold some out", index.path, f"{len(index):,}")
    hashes, numbers = least_hashes(index.keys(), seed, max(2 * count, _KEPT))
    found = np.empty(len(hashes), np.dtype([("hash", "<u8"), ("number", "<i8")]))
    found["hash"], found["number"] = hashes, numbers
    for file in files:
        with contextlib.suppress(CannotWrite), atomic(file) as part:
            part.write_bytes(hashlib.blake2b(about + found.tobytes(), digest_size=16).digest() + found.tobytes())
            break
    return hashes, numbers
