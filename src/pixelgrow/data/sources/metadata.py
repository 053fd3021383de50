"""A folder of images with their names and captions in a metadata file, as Hugging Face's ImageFolder has them."""

import os
from array import array
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.captions import Captions, captions_in, flat, wordings_from
from pixelgrow.data.sources.files import Missing, is_image, key_of, open_regular, read_regular, walk
from pixelgrow.data.sources.identity import hash_of
from pixelgrow.data.sources.index import CAPTIONS, NEITHER, UNNAMED, FileSource, Scan
from pixelgrow.data.sources.names import TEXT, bytes_of, folded_form, form, loose_form, suffix_of, text_of
from pixelgrow.data.sources.tables import FILE_NAME, open_table, table_in
from pixelgrow.errors import UserError

_LISTED = 16  # folders whose names are kept
T = TypeVar("T")


class MetadataFolder(FileSource):
    """A folder with a metadata.jsonl, metadata.csv or metadata.parquet: `file_name`, and text, caption or prompt.

    `file_name` is relative to the folder, or an absolute path into it. The index holds where each row is and a hash of
    it (28 bytes a sample); the row is read again when it is needed. An image may have several captions: in rows of
    their own, each a sample, or in one row, a list of them with weights (`captions.wordings_in`). A row that repeats
    another is bad. Images without a row are passed over.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        name = table_in(path) or "metadata.jsonl"
        self.kind = name.lower()
        self._files = Files(path)
        self._table = open_table(os.path.join(path, name))
        self._starts, self._lengths = array("q"), array("i")
        self._last: tuple[int, tuple[str, ...]] = (-1, ())  # key and captions are read one after the other
        scan = Scan(path)
        names, good, seen, rows = array("Q"), array("Q"), set(), 0  # hashes, to keep a million rows small
        for row in self._table.rows():
            rows += 1
            key, samples = f"{name}:{row.number}", row.lines
            try:
                if row.values is None:
                    raise BadImage(row.fault)
                file_name = self._files.inside(row.values.get(FILE_NAME))
                names.append(hash_of(loose_form(file_name)))
                captions = Captions(captions_in(row.values))
                texts = flat(captions.wordings)
                if hash_of(file_name, *texts) in seen:
                    raise BadImage("repeats an earlier line")
                seen.add(hash_of(file_name, *texts))
                key, samples = form(file_name), 1
                with self._files.open(file_name) as file:
                    scan.admit(file, key.encode(errors="surrogatepass"), *(text.encode() for text in texts))
            except BadImage as error:
                scan.reject(key, error.reason, samples)
                continue
            good.append(hash_of(key))
            scan.note(captions, key)
            self._starts.append(row.start)
            self._lengths.append(row.length)
        del seen
        if not rows:
            raise UserError(f"{self._table.path}: empty; expected {self._table.example}")
        self._pass_over_others(scan, name, np.unique(np.frombuffer(names, np.uint64)))
        self._finish(scan, distinct=len(np.unique(np.frombuffer(good, np.uint64))))

    def _pass_over_others(self, scan: Scan, table: str, named: np.ndarray) -> None:
        """Count what else is in the folder. `named`: sorted hashes of the file names in the metadata."""
        for folder, files in walk(os.fsencode(self.name), lambda key, reason: None):
            keys = [key_of(folder + name) for name in files]
            hashes = np.fromiter((hash_of(loose_form(key)) for key in keys), np.uint64, len(keys))
            for i in np.flatnonzero(~np.isin(hashes, named)):
                if keys[i] != table:
                    other = CAPTIONS if suffix_of(keys[i]) == TEXT else NEITHER
                    path = os.path.join(os.fsencode(self.name), folder, files[i])
                    scan.pass_over(UNNAMED if is_image(path) else other, keys[i])

    def _nothing(self) -> str:
        first = self.bad[0]
        return (
            f"{self._table.path}: none of its rows is usable (the first: {first.key}: {first.reason}); expected "
            f"{self._table.example}"
        )

    def _row(self, i: int) -> tuple[str, ...]:
        """(file name, *`flat` captions) of sample i; `UserError` if its row has changed since the index was made."""
        if i != self._last[0]:
            self._last = i, self._again(i, self._table.path, lambda: self._read_row(i))
        return self._last[1]

    def _read_row(self, i: int) -> tuple[str, ...]:
        values = self._table.again(self._starts[i], self._lengths[i])
        return form(self._files.inside(values.get(FILE_NAME))), *flat(captions_in(values))

    def key(self, i: int) -> str:
        return self._row(i)[0]

    def text(self, i: int) -> str:
        return self._row(i)[1]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._row(i)[1:])

    def read(self, i: int) -> bytes:
        return self._files.read(self.key(i))


class Files:
    """The files of a folder by the names that metadata give them.

    A name in another Unicode form, or with its suffix in another case, finds its file, if there is one such.
    """

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)
        self._tops = [key_of(os.path.abspath(self._root)) + "/", key_of(os.path.realpath(self._root)) + "/"]
        self._listed: dict[tuple[bytes, Callable[[str], str]], dict[str, list[bytes]]] = {}

    def inside(self, name: object) -> str:
        """A name relative to the folder, in its plainest form. Raises `BadImage` if it is none or leads out of it."""
        if not isinstance(name, str) or not name:
            raise BadImage(f"no {FILE_NAME}")
        plain = os.path.normpath(name)
        if os.path.isabs(plain):
            top = next((top for top in self._tops if form(plain).startswith(top)), None)
            plain = form(plain).removeprefix(top) if top is not None else ".."
        if plain == ".." or plain.startswith("../"):
            raise BadImage("path leaves the folder")
        try:
            bytes_of(plain)
        except UnicodeEncodeError:
            raise BadImage("file name is not valid Unicode") from None
        return plain

    def open(self, name: str) -> BinaryIO:
        """Open a file. Raises `BadImage` with what may be wrong with the name."""
        return self._with(name, open_regular)

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises `BadImage` as `open` does."""
        return self._with(name, read_regular)

    def _with(self, name: str, use: Callable[[bytes], T]) -> T:
        try:
            return use(os.path.join(self._root, bytes_of(name)))
        except Missing:
            found = self._find(name, loose_form)
        if found is not None:
            return use(found)
        if "\\" in name:
            raise Missing("no such file: its name has backslashes, expected / between folders")
        if self._find(name, folded_form) is not None:
            raise Missing("no such file: there is one in another case of letters")
        raise Missing("no such file")

    def _find(self, name: str, same: Callable[[str], str]) -> bytes | None:
        """The one path whose parts are the same as those of `name` once `same` is applied to both; None without one."""
        path = self._root
        for part in name.split("/"):
            found = self._names(path, same).get(same(part), [])
            if len(found) != 1:
                return None
            path = os.path.join(path, found[0])
        return path

    def _names(self, folder: bytes, same: Callable[[str], str]) -> dict[str, list[bytes]]:
        """The names in a folder by what `same` makes of them."""
        if (folder, same) not in self._listed:
            if len(self._listed) == _LISTED:
                self._listed.clear()
            names: dict[str, list[bytes]] = {}
            try:
                for name in os.listdir(folder):
                    names.setdefault(same(text_of(name)), []).append(name)
            except OSError:  # no folder, or one that may not be listed
                names = {}
            self._listed[folder, same] = names
        return self._listed[folder, same]
