"""What is in one tar shard: its samples as columns of bytes, and what cannot be used and why."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO, cast

import numpy as np

from pixelgrow.data.images import ARCHIVES, DECODED, HEAD, OUR_FAULT, BadImage, format_of
from pixelgrow.data.sources.base import BadFile
from pixelgrow.data.sources.captions import MAX_CAPTION, MAX_JSON, Captions, flat, from_json, from_text
from pixelgrow.data.sources.files import Span, key_of, open_regular
from pixelgrow.data.sources.index import FURTHER, NEITHER, VECTOR, Scan
from pixelgrow.data.sources.names import JSON, claims_image, form, is_hidden, match, suffix_of
from pixelgrow.errors import UserError

REPEATED = "members that a later one of their name replaces"
# Of a sample: where its image is in the shard, and how long; where its text is in `Part.texts`; bytes of its key and of
# its captions, of which the text consists; CRC-32 of all that.
ROW = struct.Struct("<QQQIII")
# Of a shard: its size in bytes and time of change in ns when it was scanned (-1 if that scan is not to be relied on);
# the byte where it ends, or where it is damaged; how many bytes behind that are not zeros at either end.
STAMP = struct.Struct("<4q")
_SURE = 2_000_000_000  # ns; a shard that was written so little before its scan may have been written in the midst of it
_MAX_HEADER = 1 << 20  # bytes; of a long name, say
_BLOCK = 512
_END = bytes(2 * _BLOCK)  # the mark at the end of a tar archive


@dataclass(frozen=True)
class Shard:
    """A shard: its path, and its name in the index, which samples' keys begin with."""

    path: bytes
    name: bytes
    alone: bool = False  # the one file of a source, whose name is in no key: it may be renamed

    @property
    def label(self) -> str:
        return key_of(self.name)


@dataclass(frozen=True)
class Part:
    """What a scan of one shard has found, as bytes: in an index they are joined field by field.

    `stamp`: a `STAMP`. `facts`: JSON of all that is not about its samples (`facts_of`), or nothing. Of each sample:
    `prints` uint64, `sizes` two int32 (h, w), `clear` 0 or 1, `rows` a `ROW`. `texts`: for each sample its key and its
    captions, `flat` and joined by zeros.
    """

    stamp: bytes
    prints: bytes
    sizes: bytes
    clear: bytes
    rows: bytes
    name: bytes
    facts: bytes
    texts: bytes


def stamp_of(path: bytes) -> tuple[int, int]:
    """Size and time of change of a file; (-1, -1) if there is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        return -1, -1
    return status.st_size, status.st_mtime_ns


def facts_of(damage: str, scan: Scan) -> bytes:
    """What is to be kept of a shard beside its samples: `damage`, why it is damaged, and what is in `scan`."""
    facts = {
        "damage": damage,
        "bad": [[bad.key, bad.reason] for bad in scan.bad.values()],
        "passed": [[over.reason, over.example, over.count] for over in scan.passed.values()],
        "strays": [[stray.key, stray.reason] for stray in scan.strays],
        "notes": {note: count for note, count in scan.notes.items() if count},
        "several": scan.several,
    }
    return json.dumps(facts).encode() if any(facts.values()) else b""


def add_facts(facts: bytes, scan: Scan) -> str:
    """Add the facts of one more shard to a scan of all; returns its damage."""
    if not facts:
        return ""
    found: dict[str, Any] = json.loads(facts)
    for key, reason in found["bad"]:
        scan.reject(key, reason)
    for reason, example, count in found["passed"]:
        scan.pass_over(reason, example, count)
    for key, reason in found["strays"]:
        scan.strays.append(BadFile(key, reason))
    for note, count in found["notes"].items():
        scan.count(note, count)
    scan.several = scan.several or found["several"]
    return str(found["damage"])


def scan_shard(shard: Shard) -> Part:
    """Scan a shard. Raises `UserError` for an archive that is no plain .tar."""
    return _ShardScan(shard).part()


class _ShardScan:
    def __init__(self, shard: Shard) -> None:
        self._shard, self._scan = shard, Scan()
        self._rows, self._texts = bytearray(), bytearray()
        self._damage, self._end, self._unread = "", 0, 0
        self._sure = True  # whether nothing but the file's content made the result

    def part(self) -> Part:
        began, (size, changed) = time.time_ns(), stamp_of(self._shard.path)
        try:
            raw = open_regular(self._shard.path)
        except BadImage as error:
            self._damage, self._sure = error.reason, False
        else:
            with raw:
                self._read(raw)
            self._sure = self._sure and stamp_of(self._shard.path) == (size, changed) and changed < began - _SURE
        scan = self._scan
        return Part(
            stamp=STAMP.pack(size, changed if self._sure else -1, self._end, self._unread),
            prints=np.array(scan.prints, "<u8").tobytes(),
            sizes=np.array(scan.sizes, "<i4").tobytes(),
            clear=scan.clear.tobytes(),
            rows=bytes(self._rows),
            name=self._shard.name,
            facts=facts_of(self._damage, scan),
            texts=bytes(self._texts),
        )

    def _read(self, raw: BinaryIO) -> None:
        kind = format_of(raw.read(HEAD))
        if kind in ARCHIVES:
            raise UserError(f"{key_of(self._shard.path)}: a {kind} archive; expected a plain .tar: unpack it")
        members: dict[str, tuple[int, int]] = {}
        for name, start, length in self._members(raw):
            if name in members:
                self._scan.pass_over(REPEATED, self._key_of(name))
            members[name] = start, length
        self._unread = _unread(raw, self._end) if self._damage else 0
        self._take(raw.fileno(), members)

    def _members(self, raw: BinaryIO) -> Iterator[tuple[str, int, int]]:
        """(name, start, length) of the visible regular files of a shard; it ends where the shard is damaged."""
        size = os.fstat(raw.fileno()).st_size
        if not size:
            self._damage = "empty file"
            return
        try:
            for name, start, length in _plain(raw.fileno(), size):
                self._end = start + -(-length // _BLOCK) * _BLOCK
                if not is_hidden(name):
                    yield name, start, length
            raw.seek(self._end)
            with tarfile.open(
                fileobj=cast("BinaryIO", _Headers(raw)), mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps every member it has seen
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"ends within {member.name}")
                    self._end = tar.offset
                    name = _normal(member.name)
                    if is_hidden(name):
                        continue
                    if member.isreg() and member.sparse is None:
                        yield name, member.offset_data, member.size
                    elif claims_image(name) and not member.isdir():
                        self._scan.reject(self._key_of(name), "not a regular file")
                self._end = tar.offset
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            self._doubt(error)
            self._damage = (str(error) or type(error).__name__) if self._end else f"no tar archive ({error})"
            return
        raw.seek(self._end)
        mark = raw.read(len(_END))
        if mark.strip(b"\0"):
            self._damage = f"damaged from byte {self._end} on"
        elif len(mark) < len(_END):
            self._damage = "ends without the mark of an end (two blocks of zeros): may be cut"
        else:
            while piece := raw.read(1 << 20):
                if piece.strip(b"\0"):
                    self._damage = "goes on behind the mark of its end"
                    return

    def _take(self, fd: int, members: dict[str, tuple[int, int]]) -> None:
        """Take the samples of a shard into the index."""
        scan, names, places = self._scan, list(members), list(members.values())

        def image(i: int) -> bool:
            start, length = places[i]
            return claims_image(names[i]) or format_of(os.pread(fd, min(HEAD, length), start)) in DECODED

        found = match(names, image)
        for i, caption in found.pairs:
            key = self._key_of(names[i])
            try:
                captions = self._captions(fd, suffix_of(names[caption]) == JSON, *places[caption])
                texts = [text.encode() for text in flat(captions.wordings)]
                with BufferedReader(Span(os.dup(fd), *places[i])) as file:
                    scan.admit(file, key.encode(errors="surrogateescape"), *texts)
            except BadImage as error:
                self._doubt(error.__context__)
                scan.reject(key, error.reason)
                continue
            scan.note(captions)
            self._append(places[i], key.encode(errors="surrogatepass"), b"\0".join(texts))
        for i, reason in found.faults.items():
            scan.reject(self._key_of(names[i]), reason)
        for i, reason in found.strays.items():
            scan.stray(self._key_of(names[i]), reason)
        for reason, numbers in ((NEITHER, found.others), (FURTHER, found.further), (VECTOR, found.vectors)):
            for i in numbers:
                scan.pass_over(reason, self._key_of(names[i]))

    def _append(self, place: tuple[int, int], key: bytes, captions: bytes) -> None:
        head = ROW.pack(*place, len(self._texts), len(key), len(captions), 0)[:-4]
        self._texts += key + captions
        self._rows += head + struct.pack("<I", zlib.crc32(captions, zlib.crc32(key, zlib.crc32(head))))

    def _captions(self, fd: int, is_json: bool, start: int, length: int) -> Captions:
        if length > (MAX_JSON if is_json else MAX_CAPTION):
            raise BadImage("caption file is too long")
        try:
            raw = os.pread(fd, length, start)
        except OSError as error:
            raise BadImage((error.strerror or str(error)).lower()) from None
        return from_json(raw) if is_json else from_text(raw)

    def _doubt(self, error: BaseException | None) -> None:
        """An error of the system, of a disk or a network, may be gone the next time."""
        self._sure = self._sure and not getattr(error, "errno", None)

    def _key_of(self, member: str) -> str:
        return member if self._shard.alone else f"{self._shard.label}/{member}"


class _Headers:
    """What tarfile reads of a shard: headers alone, so a long read means a damaged one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, length: int) -> bytes:
        if length > _MAX_HEADER:
            raise tarfile.ReadError(f"a header that claims {length} bytes")
        return self._file.read(length)


def _normal(name: str) -> str:
    return form(os.path.normpath("/" + name).lstrip("/"))


def _plain(fd: int, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, length) of the first members that are plain files with a plain header, which is all that most
    shards have. `tarfile`, ten times slower, reads on where they end."""
    at = 0
    while len(head := os.pread(fd, _BLOCK, at)) == _BLOCK:
        digits = head[124:135]
        name, _, rest = head[:100].partition(b"\0")
        plain = (
            head[156:157] in b"0"
            and head[257:262] == b"ustar"
            and digits.isdigit()
            and name
            and not name.endswith(b"/")
            and not rest.strip(b"\0")
            and not head[345:500].strip(b"\0")
        )
        try:
            length = int(digits, 8) if plain else -1
            told = int(head[148:156].strip(b"\0 "), 8)
        except ValueError:
            return
        start, end = at + _BLOCK, at + _BLOCK + -(-length // _BLOCK) * _BLOCK
        if length < 0 or end > size or told != sum(head) - sum(head[148:156]) + 256:
            return
        yield _normal(name.decode("utf-8", "surrogateescape")), start, length
        at = end


def _unread(raw: BinaryIO, start: int) -> int:
    """The length of a file from byte `start` on, without the zeros at both ends of this part."""
    first = last = start
    raw.seek(start)
    while piece := raw.read(1 << 20):
        if piece.strip(b"\0"):
            if first == last:
                first = raw.tell() - len(piece.lstrip(b"\0"))
            last = raw.tell() - len(piece) + len(piece.rstrip(b"\0"))
    return last - first
