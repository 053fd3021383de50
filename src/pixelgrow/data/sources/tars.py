"""Tar shards as img2dataset and webdataset write them: key.jpg with key.txt or key.json."""

import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import BinaryIO, cast

from pixelgrow.data.images import ARCHIVES, DECODED, HEAD, BadImage, format_of
from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.captions import MAX_CAPTION, MAX_JSON, Captions, flat, from_json, from_text, wordings_from
from pixelgrow.data.sources.files import in_order, is_image, key_of, open_regular, read_regular, walk
from pixelgrow.data.sources.index import BESIDE, FURTHER, NEITHER, VECTOR, FileSource, Strings
from pixelgrow.data.sources.names import JSON, claims_image, form, is_hidden, match, suffix_of, text_of
from pixelgrow.errors import UserError

ARCHIVE_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".tbz2", ".xz", ".txz", ".lz4", ".zip", ".7z", ".rar")
BELOW = "shards in folders below"
REPEATED = "members that a later one of their name replaces"
_MAX_HEADER = 1 << 20  # bytes; of a long name, say
_BLOCK = 512
_END = bytes(2 * _BLOCK)  # the mark at the end of a tar archive


class _Headers:
    """What tarfile reads of a shard: headers alone, so a long read means a damaged one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, length: int) -> bytes:
        if length > _MAX_HEADER:
            raise tarfile.ReadError(f"a header that claims {length} bytes")
        return self._file.read(length)


@dataclass
class _Shard:
    """What was read of a shard. `end`: the byte where it ends, or where it is damaged, with the reason in `damage`;
    `unread`: bytes behind that which are not zeros at either end."""

    name: str
    samples: int = 0
    end: int = 0
    damage: str = ""
    unread: int = 0


class TarShards(FileSource):
    """A folder of .tar files, or one of them; read in place, 48 bytes and the key in memory for each sample.

    Images and captions of a shard are matched by name (`names.match`), in any order; the last of several members with
    one name counts, as in unpacking. A caption file is as in a folder. An archive ends in two blocks of zeros: a shard
    without them is used as far as it goes, and listed with an estimate of the samples that are lost. Compressed shards
    cannot be read in place: `UserError`.
    """

    kind = "tar shards"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._paths = shard_paths(path)
        self._one = not os.path.isdir(path)  # a source's own name is in no key: it may be renamed
        self._keys = Strings()
        self._shard, self._where, self._what = array("i"), array("q"), array("i")
        shards = [self._scan(number, shard) for number, shard in enumerate(self._paths)]
        for shard in shards:
            if shard.damage:
                lost, words = _lost(shard, shards)
                self._reject(shard.name, f"shard: {shard.damage}; {words}", lost)
        if not self._one:
            self._pass_over_others(os.fsencode(path))
        self._finish()

    def _pass_over_others(self, root: bytes) -> None:
        """Count what else is in the folder of the shards."""
        shards = set(self._paths)
        for folder, names in walk(root, lambda key, reason: None):
            for name in names:
                path = os.path.join(root, folder, name)
                if path not in shards:
                    is_shard = suffix_of(key_of(name)) == ".tar"
                    self._pass_over(BELOW if is_shard else BESIDE if is_image(path) else NEITHER, key_of(folder + name))

    def _scan(self, number: int, path: bytes) -> _Shard:
        shard = _Shard(key_of(os.path.basename(path)))
        try:
            raw = open_regular(path)
        except BadImage as error:
            shard.damage = error.reason
            return shard
        with raw:
            kind = format_of(raw.read(HEAD))
            if kind in ARCHIVES:
                raise UserError(f"{key_of(path)}: a {kind} archive; expected a plain .tar: unpack it")
            raw.seek(0)
            members: dict[str, tuple[int, int]] = {}
            for name, start, length in self._members(shard, raw):
                if name in members:
                    self._pass_over(REPEATED, self._key_of(shard, name))
                members[name] = start, length
            shard.unread = _unread(raw, shard.end) if shard.damage else 0
            self._take(number, shard, raw, members)
        return shard

    def _members(self, shard: _Shard, raw: BinaryIO) -> Iterator[tuple[str, int, int]]:
        """(name, start, length) of the visible regular files of a shard; it ends where the shard is damaged."""
        size = os.fstat(raw.fileno()).st_size
        if not size:
            shard.damage = "empty file"
            return
        try:
            with tarfile.open(
                fileobj=cast("BinaryIO", _Headers(raw)), mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps every member it has seen
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"ends within {member.name}")
                    shard.end = tar.offset
                    name = form(os.path.normpath("/" + member.name).lstrip("/"))
                    if is_hidden(name):
                        continue
                    if member.isreg() and member.sparse is None:
                        yield name, member.offset_data, member.size
                    elif claims_image(name) and not member.isdir():
                        self._reject(self._key_of(shard, name), "not a regular file")
                shard.end = tar.offset
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            shard.damage = (str(error) or type(error).__name__) if shard.end else f"no tar archive ({error})"
            return
        raw.seek(shard.end)
        mark = raw.read(len(_END))
        if mark.strip(b"\0"):
            shard.damage = f"damaged from byte {shard.end} on"
        elif len(mark) < len(_END):
            shard.damage = "ends without the mark of an end (two blocks of zeros): may be cut"
        else:
            while piece := raw.read(1 << 20):
                if piece.strip(b"\0"):
                    shard.damage = "goes on behind the mark of its end"
                    return

    def _take(self, number: int, shard: _Shard, raw: BinaryIO, members: dict[str, tuple[int, int]]) -> None:
        """Take the samples of a shard into the index."""
        names, places = list(members), list(members.values())

        def image(i: int) -> bool:
            start, length = places[i]
            return claims_image(names[i]) or format_of(os.pread(raw.fileno(), min(HEAD, length), start)) in DECODED

        found = match(names, image)
        for i, caption in found.pairs:
            key, is_json = self._key_of(shard, names[i]), suffix_of(names[caption]) == JSON
            try:
                captions = _caption(self._paths[number], is_json, *places[caption])
                with open_regular(self._paths[number], *places[i]) as file:
                    texts = flat(captions.wordings)
                    self._admit(file, key.encode(errors="surrogateescape"), *(text.encode() for text in texts))
            except BadImage as error:
                self._reject(key, error.reason)
                continue
            shard.samples += 1
            self._note(captions)
            self._keys.append(key.encode(errors="surrogateescape"))
            self._shard.append(number)
            self._where.extend((*places[i], places[caption][0]))
            self._what.extend((places[caption][1], is_json))
        for i, reason in found.faults.items():
            self._reject(self._key_of(shard, names[i]), reason)
        for i, reason in found.strays.items():
            self._stray(self._key_of(shard, names[i]), reason)
        for i in found.others:
            self._pass_over(NEITHER, self._key_of(shard, names[i]))
        for i in found.further:
            self._pass_over(FURTHER, self._key_of(shard, names[i]))
        for i in found.vectors:
            self._pass_over(VECTOR, self._key_of(shard, names[i]))

    def _key_of(self, shard: _Shard, member: str) -> str:
        return member if self._one else f"{shard.name}/{member}"

    def key(self, i: int) -> str:
        return self._keys[i].decode(errors="surrogateescape")

    def text(self, i: int) -> str:
        return self._said(i)[0]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._said(i))

    def _said(self, i: int) -> tuple[str, ...]:
        path, (length, is_json) = self._paths[self._shard[i]], self._what[2 * i : 2 * i + 2]
        start = self._where[3 * i + 2]
        return self._again(i, key_of(path), lambda: flat(_caption(path, bool(is_json), start, length).wordings))

    def read(self, i: int) -> bytes:
        start, length = self._where[3 * i : 3 * i + 2]
        return read_regular(self._paths[self._shard[i]], start, length)


def _caption(path: bytes, is_json: bool, start: int, length: int) -> Captions:
    if length > (MAX_JSON if is_json else MAX_CAPTION):
        raise BadImage("caption file is too long")
    raw = read_regular(path, start, length)
    return from_json(raw) if is_json else from_text(raw)


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


def _lost(shard: _Shard, shards: list[_Shard]) -> tuple[int, str]:
    """How many samples of a damaged shard are lost, at least one, and in words.

    As many as whole shards have more of, or as fit into the bytes that cannot be read, whichever is more.
    """
    whole = [other.samples for other in shards if other.samples and not other.damage]
    samples, read = sum(other.samples for other in shards), sum(other.end for other in shards if other.samples)
    unread = shard.unread * samples / read if read else 0.0
    usual = median(whole) if whole else max(other.samples for other in shards)
    lost = max(1, round(unread), round(usual) - shard.samples)
    if not whole and lost == 1:
        return 1, "the number of lost samples is unknown"
    return lost, f"about {lost} samples are lost (an estimate)"


def shard_paths(path: str) -> list[bytes]:
    """The .tar files that a path means, in order: itself, or those in the folder. Raises `UserError` for none."""
    root = os.fsencode(path)
    if not os.path.isdir(root):
        return [root]
    names = [name for name in in_order(os.listdir(root)) if not is_hidden(text_of(name))]
    shards = [os.path.join(root, name) for name in names if suffix_of(text_of(name)) == ".tar"]
    other = next((key_of(name) for name in names if suffix_of(text_of(name)) in ARCHIVE_SUFFIXES), None)
    if other:
        raise UserError(f"{path}: {other} is a compressed archive; expected plain .tar: unpack it")
    if not shards:
        raise UserError(f"{path}: no .tar files in it; expected shards with key.jpg and key.txt or key.json")
    return shards
