"""The index of a source of shards as a file: a safetensors file of plain arrays, read in place by all processes.

Each array is what one field of `shards.Part` has for all shards, joined; `ends` says where each part of it ends.
Arrays are read where they are asked for, not mapped: the system keeps what is read once for all processes, none of them
grows by it, and a file that is cut off or a broken disk are errors instead of a signal.

What is looked at as a whole (`ends`, sizes, names, ...) is checked by CRC-32 when the file is opened, a sample's row
and text by their own whenever they are read.

A journal keeps the parts of a scan that is not finished: for each a head and its fields, one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pixelgrow.data.sources.identity import digest, digest_of
from pixelgrow.data.sources.shards import ROW, STAMP, Part
from pixelgrow.errors import UserError
from pixelgrow.writing import atomic, writing

FORM = "pixelgrow index 1"  # raise the number when what a scan finds, or how it is kept, changes
FIELDS = tuple(field.name for field in fields(Part))
STAMPS, PRINTS, SIZES, CLEAR, ROWS, NAME, FACTS, TEXTS = range(len(FIELDS))
_ARRAYS: dict[str, tuple[str, int, tuple[int, ...]]] = {  # name: type, bytes of an item, its shape
    "ends": ("I64", 8 * len(FIELDS), (len(FIELDS),)),
    "stamp": ("I64", STAMP.size, (STAMP.size // 8,)),
    "prints": ("U64", 8, ()),
    "sizes": ("I32", 8, (2,)),
    "clear": ("U8", 1, ()),
    "rows": ("U8", ROW.size, (ROW.size,)),
    "name": ("U8", 1, ()),
    "facts": ("U8", 1, ()),
    "texts": ("U8", 1, ()),
}
_CHECKED = ("ends", "stamp", "sizes", "clear", "name", "facts")
_HEAD = struct.Struct(f"<8s{len(FIELDS)}Q16s")  # of a part in a journal: a mark, lengths of its fields, a hash of all
_MARK = b"a shard\n"
_PIECE = 1 << 22  # bytes that are copied or checked at a time
_MAX_HEADER = 1 << 16


class Damaged(Exception):
    """A file that is no index, or not a whole one; the message says why."""


@dataclass(frozen=True)
class Found:
    """Where the fields of a part are in an open file: (offset, length) of each. `size`, `time`: of its `STAMP`."""

    fd: int
    size: int
    time: int
    spans: tuple[tuple[int, int], ...]

    def read(self, field: int) -> bytes:
        offset, length = self.spans[field]
        return _read(self.fd, offset, length)


@dataclass(frozen=True)
class Row:
    """Where a sample is: its shard's number, its image in it; its key, and its captions as `flat` has them."""

    shard: int
    start: int
    length: int
    key: str
    captions: tuple[str, ...]


class Stored:
    """An open index. Raises `Damaged`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open()
        except OSError as error:
            raise Damaged((error.strerror or str(error)).lower()) from None

    def _open(self) -> None:
        self._header, tensors, about, base = _header_of(self._fd)
        self._at = {name: base + tensors[name]["data_offsets"][0] for name in _ARRAYS}
        lengths = {name: base + tensors[name]["data_offsets"][1] - self._at[name] for name in _ARRAYS}
        if os.fstat(self._fd).st_size != base + sum(lengths.values()):
            raise Damaged("it is cut off")
        for name in _CHECKED:
            if _crc(self._fd, self._at[name], lengths[name]) != about[name]:
                raise Damaged(f"its {name} are not what was written")
        self.digest: str = about["digest"]
        ends = np.frombuffer(_read(self._fd, self._at["ends"], lengths["ends"]), "<i8").reshape(-1, len(FIELDS))
        if [int(end) for end in ends[-1]] != [lengths[field] for field in FIELDS]:
            raise Damaged("its ends are not those of its arrays")
        self._starts = np.concatenate([np.zeros((1, len(FIELDS)), np.int64), ends])
        self._firsts = np.ascontiguousarray(self._starts[:, CLEAR])  # a byte a sample
        stamps = _read(self._fd, self._at["stamp"], lengths["stamp"])
        self.stamps = np.frombuffer(stamps, "<i8").reshape(len(ends), -1)  # (S, 4)
        names = _read(self._fd, self._at["name"], lengths["name"])
        cuts = self._starts[:, NAME].tolist()
        self.names = [names[a:b] for a, b in itertools.pairwise(cuts)]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_header": self._header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            self.__init__(state["path"])  # type: ignore[misc]
        except Damaged as error:
            raise self._damaged(str(error)) from None
        if self._header != state["_header"]:
            raise self._damaged("another index")

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _column(self, name: str, dtype: str, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        item = _ARRAYS[name][1]
        return np.frombuffer(self._bytes(self._at[name] + item * start, item * max(0, stop - start)), dtype)

    def sizes(self, part: slice) -> np.ndarray:
        return self._column("sizes", "<i4", part).reshape(-1, 2)

    def clear(self, part: slice) -> np.ndarray:
        return self._column("clear", "?", part)

    @property
    def prints(self) -> np.ndarray:
        """Memory-mapped; `UserError` if they are not what was written."""
        page = self._at["prints"] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skip = self._at["prints"] - page
        mapped = mmap.mmap(self._fd, skip + 8 * len(self), access=mmap.ACCESS_READ, offset=page)
        found = np.frombuffer(mapped, "<u8", offset=skip)
        if digest_of(found) != self.digest:
            raise self._damaged("its prints are not what was written")
        return found

    def print(self, i: int) -> int:
        """The hash of sample i (`identity`)."""
        return int(self._column("prints", "<u8", slice(i, i + 1))[0])

    def row(self, i: int) -> Row:
        """Where sample i is. Raises `UserError` if the index is damaged there."""
        raw = self._bytes(self._at["rows"] + ROW.size * i, ROW.size)
        shard = int(np.searchsorted(self._firsts, i, side="right")) - 1
        start, length, at, key, captions, check = ROW.unpack(raw)
        if at + key + captions > self._starts[shard + 1, TEXTS] - self._starts[shard, TEXTS]:
            raise self._damaged(f"sample {i} is not what was written")
        text = self._bytes(self._at["texts"] + int(self._starts[shard, TEXTS]) + at, key + captions)
        if zlib.crc32(text, zlib.crc32(raw[:-4])) != check:
            raise self._damaged(f"sample {i} is not what was written")
        said = tuple(text[key:].decode().split("\0"))
        return Row(shard, start, length, text[:key].decode(errors="surrogatepass"), said)

    def keys(self) -> Iterator[str]:
        """The keys of all samples in order. Raises `UserError` as `row` does."""
        for shard in range(len(self.names)):
            start, stop = self._firsts[shard : shard + 2].tolist()
            rows = self._bytes(self._at["rows"] + ROW.size * start, ROW.size * (stop - start))
            first, last = self._starts[shard : shard + 2, TEXTS].tolist()
            texts = self._bytes(self._at["texts"] + first, last - first)
            for i, (_, _, at, key, captions, check) in enumerate(ROW.iter_unpack(rows)):
                text = texts[at : at + key + captions]
                if zlib.crc32(text, zlib.crc32(rows[ROW.size * i : ROW.size * (i + 1) - 4])) != check:
                    raise self._damaged(f"sample {start + i} is not what was written")
                yield text[:key].decode(errors="surrogatepass")

    def facts(self) -> Iterator[bytes]:
        """The `facts_of` each shard."""
        cuts = self._starts[:, FACTS].tolist()
        found = _read(self._fd, self._at["facts"], cuts[-1])
        return (found[a:b] for a, b in itertools.pairwise(cuts))

    def counts(self) -> list[int]:
        """How many samples each shard has."""
        counts: list[int] = np.diff(self._firsts).tolist()
        return counts

    @property
    def cuts(self) -> np.ndarray:
        """How many samples are before each shard, and all, (S + 1,)."""
        return self._firsts

    def found(self, shard: int) -> Found:
        """The part of a shard, to be copied."""
        cuts = self._starts[shard : shard + 2].tolist()
        spans = ((self._at[name] + a, b - a) for name, a, b in zip(FIELDS, *cuts, strict=True))
        size, time = self.stamps[shard, :2].tolist()
        return Found(self._fd, size, time, tuple(spans))

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            return _read(self._fd, offset, length)
        except (OSError, Damaged) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path}: the index is damaged ({reason}): delete it, and it is written anew")


def write(path: Path, parts: Sequence[Found]) -> None:
    """Write the index of shards, in order; whole or not at all. Raises `CannotWrite`."""
    lengths = np.array([[length for _, length in part.spans] for part in parts], np.int64).reshape(-1, len(FIELDS))
    ends = np.cumsum(lengths, axis=0)
    totals = dict(zip(FIELDS, ends[-1].tolist(), strict=True)) | {"ends": ends.nbytes}
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(_header(totals, dict.fromkeys(_CHECKED, 0) | {"digest": "0" * 32}))
        about: dict[str, Any] = {"ends": zlib.crc32(ends.astype("<i8").tobytes())}
        file.write(ends.astype("<i8").tobytes())
        prints = digest()
        for name in list(_ARRAYS)[1:]:
            crc = 0
            for part in parts:
                for piece in _pieces(part.fd, *part.spans[FIELDS.index(name)]):
                    file.write(piece)
                    if name in _CHECKED:
                        crc = zlib.crc32(piece, crc)
                    elif name == "prints":
                        prints.update(piece)
            if name in _CHECKED:
                about[name] = crc
        file.seek(0)
        file.write(_header(totals, about | {"digest": prints.hexdigest()}))


def _header(lengths: dict[str, int], about: dict[str, Any]) -> bytes:
    """The head of the file: `lengths` of the arrays in bytes, and what is known about them; the same length for any."""
    tensors: dict[str, Any] = {}
    start = 0
    for name, (kind, item, shape) in _ARRAYS.items():
        stop = start + lengths[name]
        tensors[name] = {"dtype": kind, "shape": [lengths[name] // item, *shape], "data_offsets": [start, stop]}
        start = stop
    about = {key: f"{value:010}" if isinstance(value, int) else value for key, value in about.items()}
    sealed = tensors | {"__metadata__": {"form": FORM, **dict(sorted(about.items()))}}
    sealed["__metadata__"]["seal"] = _seal(sealed)
    text = json.dumps(sealed).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


def _seal(header: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16).hexdigest()


def _header_of(fd: int) -> tuple[bytes, dict[str, Any], dict[str, Any], int]:
    """(header, tensors, what is known about them, where they begin) of an open index. Raises `Damaged`, OSError."""
    raw = os.pread(fd, _MAX_HEADER, 0)
    length = int.from_bytes(raw[:8], "little")
    try:
        tensors = json.loads(raw[8 : 8 + length])
        about = tensors["__metadata__"]
        seal = about.pop("seal")
        if about["form"] != FORM:
            raise Damaged("another version wrote it")
        if _seal(tensors) != seal:
            raise Damaged("its head is not what was written")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged("it is no index") from None
    about = {key: int(value) if key in _CHECKED else value for key, value in about.items()}
    return raw[: 8 + length], tensors, about, 8 + length


class Journal:
    """The parts of an unfinished scan in a file that only grows. A part that was not written whole is dropped."""

    def __init__(self, path: Path) -> None:
        """Open or begin a journal. Raises `CannotWrite`."""
        self.path = path
        with writing(path):
            self._file: BinaryIO = path.open("a+b", buffering=0)
            self._end = 0
            self.found = dict(self._parts())
            self._file.truncate(self._end)

    def _parts(self) -> Iterator[tuple[bytes, Found]]:
        fd = self._file.fileno()
        while len(head := os.pread(fd, _HEAD.size, self._end)) == _HEAD.size:
            mark, *lengths, check = _HEAD.unpack(head)
            part = _found(fd, self._end + _HEAD.size, lengths)
            size = os.fstat(fd).st_size
            if mark != _MARK or part.spans[-1][0] + part.spans[-1][1] > size:
                return
            hashed = hashlib.blake2b(head[:-16], digest_size=16)
            for span in part.spans:
                for piece in _pieces(fd, *span):
                    hashed.update(piece)
            if hashed.digest() != check:
                return
            self._end = part.spans[-1][0] + part.spans[-1][1]
            yield part.read(NAME), _stamped(part)

    def add(self, part: Part) -> Found:
        """Append a part. Raises `CannotWrite`, then the journal is as before."""
        values: list[bytes] = [getattr(part, name) for name in FIELDS]
        head = _HEAD.pack(_MARK, *map(len, values), bytes(16))[:-16]
        check = hashlib.blake2b(b"".join([head, *values]), digest_size=16).digest()
        data = memoryview(b"".join([head, check, *values]))
        with writing(self.path):
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:]) or 0
            except OSError:
                self._file.truncate(self._end)
                raise
        found = _found(self._file.fileno(), self._end + _HEAD.size, [len(value) for value in values])
        self._end += len(data)
        self.found[part.name] = _stamped(found)
        return self.found[part.name]

    def close(self) -> None:
        self._file.close()


def _found(fd: int, start: int, lengths: Iterable[int]) -> Found:
    spans = []
    for length in lengths:
        spans.append((start, length))
        start += length
    return Found(fd, -1, -1, tuple(spans))


def _stamped(part: Found) -> Found:
    size, time, *_ = STAMP.unpack(part.read(STAMPS))
    return Found(part.fd, size, time, part.spans)


def _pieces(fd: int, offset: int, length: int) -> Iterator[bytes]:
    for start in range(0, length, _PIECE):
        yield _read(fd, offset + start, min(_PIECE, length - start))


def _crc(fd: int, offset: int, length: int) -> int:
    crc = 0
    for piece in _pieces(fd, offset, length):
        crc = zlib.crc32(piece, crc)
    return crc


def _read(fd: int, offset: int, length: int) -> bytes:
    """Exactly `length` bytes. Raises `Damaged`, OSError."""
    found = os.pread(fd, length, offset)
    while len(found) < length:  # a read of more than 2 GiB, or one that a signal cut short
        more = os.pread(fd, length - len(found), offset + len(found))
        if not more:
            raise Damaged("it is cut off")
        found += more
    return found
