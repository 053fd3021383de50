"""Tar shards as img2dataset and webdataset write them: key.jpg with key.txt or key.json."""

import hashlib
import io
import os
from collections.abc import Iterator

import numpy as np

from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.captions import wordings_from
from pixelgrow.data.sources.files import in_order, is_image, key_of, read_regular, walk
from pixelgrow.data.sources.identity import print_of
from pixelgrow.data.sources.index import BESIDE, NEITHER, FileSource, Scan, changed
from pixelgrow.data.sources.keeping import index_of, kept_hashes, places_of
from pixelgrow.data.sources.names import is_hidden, suffix_of, text_of
from pixelgrow.data.sources.patterns import is_pattern, paths_in
from pixelgrow.data.sources.shards import Shard, add_facts, stamp_of
from pixelgrow.data.sources.stored import Row, Stored
from pixelgrow.errors import UserError

ARCHIVE_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".tbz2", ".xz", ".txz", ".lz4", ".zip", ".7z", ".rar")
BELOW = "shards in folders below"


class TarShards(FileSource):
    """A folder of .tar files, one of them, or a pattern of names (`patterns`); read in place.

    Images and captions of a shard are matched by name (`names.match`), in any order; the last of several members with
    one name counts, as in unpacking. A caption file is as in a folder. An archive ends in two blocks of zeros: a shard
    without them is used as far as it goes, and listed with an estimate of the samples that are lost. Compressed shards
    cannot be read in place: `UserError`.

    Samples are known by an index on the disk (`keeping`), which has their captions too.
    """

    kind = "tar shards"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._root, names, what = shards_of(path)
        alone = what == "alone"
        shards = [Shard(os.path.join(self._root, name), name, alone) for name in names]
        self._places = places_of(self._root, os.fsdecode(names[0]) if alone else what)
        self._index = index_of(shards, path, self._places)
        scan = self._facts()
        if os.path.isdir(path):
            self._pass_over_others(set(names), scan)
        self._finish(scan, self._index)

    def _facts(self) -> Scan:
        """What the index knows of all shards beside their samples."""
        scan = Scan()
        damages = [add_facts(facts, scan) for facts in self._index.facts()]
        for shard, lost, words in _losses(self._index, damages):
            scan.reject(key_of(self._index.names[shard]), f"shard: {damages[shard]}; {words}", lost)
        return scan

    def _pass_over_others(self, shards: set[bytes], scan: Scan) -> None:
        """Count what else is in the folder of the shards."""
        for folder, names in walk(self._root, lambda key, reason: None):
            for name in names:
                if folder or name not in shards:
                    is_shard = suffix_of(key_of(name)) == ".tar"
                    image = not is_shard and is_image(os.path.join(self._root, folder, name))
                    scan.pass_over(BELOW if is_shard else BESIDE if image else NEITHER, key_of(folder + name))

    @property
    def cuts(self) -> np.ndarray:
        """How many samples are before each shard, and all, (S + 1,)."""
        return self._index.cuts

    def key(self, i: int) -> str:
        return self._index.row(i).key

    def keys(self) -> Iterator[str]:
        return self._index.keys()

    def text(self, i: int) -> str:
        return self._index.row(i).captions[0]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._index.row(i).captions)

    def least(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `base.least_of`."""
        return kept_hashes(self._index, seed, count, self._places)

    def read(self, i: int) -> bytes:
        row = self._index.row(i)
        path = os.path.join(self._root, self._index.names[row.shard])
        data = read_regular(path, row.start, row.length)
        if stamp_of(path) != tuple(self._index.stamps[row.shard, :2].tolist()):
            self._check(i, row, data, path)
        return data

    def _check(self, i: int, row: Row, data: bytes, path: bytes) -> None:
        """Raise `UserError` if the bytes of an image are not those of sample i."""
        about = (row.key.encode(errors="surrogateescape"), *(text.encode() for text in row.captions))
        if print_of(io.BytesIO(data), *about) != self._index.print(i):
            raise changed(key_of(path), f"another image in the place of {row.key}")


def _losses(index: Stored, damages: list[str]) -> Iterator[tuple[int, int, str]]:
    """(number, samples that are lost, at least one, the same in words) of each damaged shard.

    As many are lost as whole shards have more of, or as fit into the bytes that cannot be read, whichever is more.
    """
    if not any(damages):
        return
    samples, ends = np.array(index.counts()), index.stamps[:, 2]
    whole = samples[(samples > 0) & ~np.array(damages, np.bool_)]
    usual = float(np.median(whole)) if len(whole) else int(samples.max())
    read = int(ends[samples > 0].sum())
    for shard in np.flatnonzero(np.array(damages, np.bool_)).tolist():
        unread = int(index.stamps[shard, 3]) * int(samples.sum()) / read if read else 0.0
        lost = max(1, round(unread), round(usual) - int(samples[shard]))
        unknown = not len(whole) and lost == 1
        words = "the number of lost samples is unknown" if unknown else f"about {lost} samples are lost (an estimate)"
        yield shard, lost, words


def shards_of(path: str) -> tuple[bytes, list[bytes], str]:
    """The folder of the shards that a path means, their names in it in order, and what they are: "shards", all of the
    folder; "alone", the one that is named; or a name for the pattern. Raises `UserError` if there are none."""
    root = os.fsencode(path)
    if not os.path.isdir(root):
        if os.path.exists(root) or not is_pattern(path):
            return os.path.dirname(root) or b".", [os.path.basename(root)], "alone"
        return _of_pattern(path)
    names = [name for name in in_order(os.listdir(root)) if not is_hidden(text_of(name))]
    shards = [name for name in names if suffix_of(text_of(name)) == ".tar"]
    other = next((key_of(name) for name in names if suffix_of(text_of(name)) in ARCHIVE_SUFFIXES), None)
    if other:
        raise UserError(f"{path}: {other} is a compressed archive; expected plain .tar: unpack it")
    if not shards:
        raise UserError(f"{path}: no .tar files in it; expected shards with key.jpg and key.txt or key.json")
    return root, shards, "shards"


def _of_pattern(path: str) -> tuple[bytes, list[bytes], str]:
    paths = [os.fsencode(found) for found in paths_in(path)]
    other = next((found for found in paths if suffix_of(text_of(found)) != ".tar"), None)
    if other is not None:
        raise UserError(f"{path}: stands for {key_of(other)}; expected plain .tar files")
    folders = {os.path.dirname(found) for found in paths}
    root = os.path.commonpath(folders) if len(folders) > 1 else next(iter(folders))
    names = [found[len(root) :].lstrip(b"/") for found in paths]
    hashed = hashlib.blake2b(os.fsencode(os.path.basename(path)) + b"\0".join(sorted(folders)), digest_size=8)
    return root or b".", names, f"shards-{hashed.hexdigest()}"
