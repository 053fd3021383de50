"""Tar shards as img2dataset and webdataset write them: key.jpg with key.txt or key.json, neighbours in the archive."""

import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.files import is_image, is_other_image, open_regular, read_regular
from pixelgrow.data.sources.index import (
    MAX_CAPTION,
    FileSource,
    Strings,
    decode_caption,
    flat,
    wordings_from,
    wordings_in,
)
from pixelgrow.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_MAX_JSON = 1 << 20
_MAX_HEADER = 1 << 20  # bytes; of a long name, say


class _Headers:
    """A shard as tarfile sees it: it reads headers alone, so whoever claims a long one is damaged."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, length: int) -> bytes:
        if length > _MAX_HEADER:
            raise tarfile.ReadError(f"a header that claims {length} bytes")
        return self._file.read(length)


@dataclass
class _Group:
    """The neighbouring members of one key: where image and captions lie."""

    key: str
    images: list[tuple[str, int, int]] = field(default_factory=list)  # member, start, length
    unsupported: str = ""
    captions: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix -> start, length


class TarShards(FileSource):
    """A folder of .tar files, or one of them; read in place, 48 bytes and the key in memory for each sample.

    A caption is key.txt, else "caption" or "text" in key.json, a text or a list of them (`wordings_in`). The members of
    a key must be neighbours: interleaved keys raise `UserError`, for they would cut a sample in two. Compressed shards
    cannot be read in place: `UserError`.
    """

    kind = "tar shards"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._shards = shard_paths(path)
        self._one = not os.path.isdir(path)  # a source's own name is in no key: it may be renamed
        self._keys = Strings()
        self._shard, self._where, self._what = array("i"), array("q"), array("i")
        for number, shard in enumerate(self._shards):
            self._scan(number, shard)
        self._finish()

    def _scan(self, number: int, shard: str) -> None:
        name = os.path.basename(shard)
        try:
            raw = open_regular(shard)
        except BadImage as error:
            self._reject(name, f"shard: {error.reason}")
            return
        with raw:
            size = os.fstat(raw.fileno()).st_size
            if raw.read(6)[:2] == b"\x1f\x8b" or size == 0:
                if size:
                    raise UserError(f"{shard}: a compressed shard; expected a plain .tar: decompress it first")
                self._reject(name, "shard: empty file")
                return
            raw.seek(0)
            self._groups(number, name, raw, size)

    def _groups(self, number: int, name: str, raw: BinaryIO, size: int) -> None:
        """Take the neighbouring members of a shard together, key by key."""
        group: _Group | None = None
        seen: set[str] = set()
        for member in self._members(name, raw, size):
            folder, base = os.path.split(member.name)
            stem, _, suffix = base.partition(".")
            key = os.path.join(folder, stem)
            if group is None or key != group.key:
                if group is not None:
                    self._close(number, name, group)
                if key in seen:
                    raise UserError(
                        f"{name}: the members of key {key!r} are not neighbours; expected key.jpg and key.txt one "
                        "after the other: write the shard again, sorted by name"
                    )
                seen.add(key)
                group = _Group(key)
            self._sort_in(group, member.name, suffix.lower(), member.offset_data, member.size)
        if group is not None:
            self._close(number, name, group)

    def _members(self, name: str, raw: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
        """The visible regular files of a shard, in order; where the shard is damaged it ends, and is listed."""
        try:
            with tarfile.open(fileobj=cast("BinaryIO", _Headers(raw)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps every member it has seen
                    base = os.path.basename(member.name)
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"ends within {member.name}")
                    if member.isreg() and member.sparse is None and not base.startswith("."):
                        yield member
                    elif is_image(os.fsencode(base)) and not base.startswith("."):
                        self._reject(self._key_of(name, member.name), "not a regular file")
                raw.seek(tar.offset)
                if raw.read(512).strip(b"\0"):
                    raise tarfile.ReadError(f"damaged from byte {tar.offset} on")
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            self._reject(name, f"shard: {str(error) or type(error).__name__}, what follows is lost")

    def _sort_in(self, group: _Group, member: str, suffix: str, start: int, length: int) -> None:
        name = b"x." + suffix.replace(".", "_").encode(errors="surrogateescape")  # seg.png is no picture of the sample
        if is_image(name):
            group.images.append((member, start, length))
        elif is_other_image(name):
            group.unsupported = member
        elif suffix in ("txt", "json"):
            group.captions[suffix] = (start, length)
        else:
            self.ignored += 1

    def _close(self, number: int, name: str, group: _Group) -> None:
        """Take a complete group into the index, or list what is wrong with it."""
        if not group.images and not group.unsupported and not group.captions:
            return
        member = group.images[0][0] if group.images else group.unsupported or group.key
        key = self._key_of(name, member)
        try:
            if len(group.images) > 1:
                raise BadImage(f"{len(group.images)} images with one key")
            if not group.images:
                raise BadImage("format not supported (JPEG, PNG and WebP are)" if group.unsupported else "no image")
            if not group.captions:
                raise BadImage("no caption")
            suffix = "txt" if "txt" in group.captions else "json"
            caption = group.captions[suffix]
            texts = self._caption(self._shards[number], suffix == "json", *caption)
            _, start, length = group.images[0]
            with open_regular(self._shards[number], start, length) as file:
                self._admit(file, key.encode(errors="surrogateescape"), *(t.encode() for t in texts))
        except BadImage as error:
            self._reject(key, error.reason)
            return
        self._note(*texts)
        self.several = self.several or len(texts) > 1
        self._keys.append(key.encode(errors="surrogateescape"))
        self._shard.append(number)
        self._where.extend((start, length, caption[0]))
        self._what.extend((caption[1], suffix == "json"))

    def _key_of(self, shard: str, member: str) -> str:
        return member if self._one else f"{shard}/{member}"

    @staticmethod
    def _caption(shard: str, is_json: bool, start: int, length: int) -> tuple[str, ...]:
        if length > (_MAX_JSON if is_json else MAX_CAPTION):
            raise BadImage("caption file is too long")
        raw = read_regular(shard, start, length)
        if not is_json:
            return (decode_caption(raw),)
        try:
            row = json.loads(raw.decode())
        except UnicodeDecodeError:
            raise BadImage("caption is not UTF-8") from None
        except (ValueError, RecursionError):
            raise BadImage("caption file is not JSON") from None
        if not isinstance(row, dict):
            raise BadImage("caption file is not a JSON object")
        return flat(wordings_in(row.get("text") if row.get("caption") is None else row["caption"]))

    def key(self, i: int) -> str:
        return self._keys[i].decode(errors="surrogateescape")

    def text(self, i: int) -> str:
        return self._said(i)[0]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._said(i))

    def _said(self, i: int) -> tuple[str, ...]:
        shard, (length, is_json) = self._shards[self._shard[i]], self._what[2 * i : 2 * i + 2]
        return self._again(i, shard, lambda: self._caption(shard, bool(is_json), self._where[3 * i + 2], length))

    def read(self, i: int) -> bytes:
        start, length = self._where[3 * i : 3 * i + 2]
        return read_regular(self._shards[self._shard[i]], start, length)


def shard_paths(path: str) -> list[str]:
    """The .tar files that a path means, sorted: itself, or those in the folder. Raises `UserError` for none."""
    if not os.path.isdir(path):
        return [path]
    names = sorted(n for n in os.listdir(path) if not n.startswith("."))
    shards = [os.path.join(path, n) for n in names if n.endswith(".tar")]
    compressed = [n for n in names if n.endswith(COMPRESSED)]
    if compressed:
        raise UserError(f"{path}: {compressed[0]} is a compressed shard; expected plain .tar: decompress them first")
    if not shards:
        raise UserError(f"{path}: no .tar files in it; expected shards with key.jpg and key.txt or key.json")
    return shards
