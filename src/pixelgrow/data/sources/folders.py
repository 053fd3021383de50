"""Folders of images: captions in metadata.jsonl, captions in .txt files beside the images, or one folder per class."""

import json
import os
from array import array
from collections.abc import Iterator

import numpy as np

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.files import (
    contains,
    has_image_named,
    is_image,
    is_other_image,
    open_regular,
    read_regular,
    suffix,
    walk,
)
from pixelgrow.data.sources.identity import hash_of
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

METADATA = "metadata.jsonl"
_MAX_LINE = 1 << 20
_UNSUPPORTED = "format not supported (JPEG, PNG and WebP are)"


class MetadataFolder(FileSource):
    """A folder with a metadata.jsonl, one `{"file_name": ..., "text": ...}` a line.

    The index holds where each line stands and a hash of it (28 bytes a sample); the line is read again when it is asked
    for. A file may have several captions: in lines of their own, each a sample, or in one line, a list of them with
    weights (`wordings_in`). A line that repeats another is bad. Images without a line are passed over, and counted as
    `unnamed`.
    """

    kind = "metadata.jsonl"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._root = os.fsencode(path)
        self._metadata = os.path.join(path, METADATA)
        self._starts, self._lengths = array("q"), array("i")
        self._last: tuple[int, tuple[str, ...]] = (
            -1,
            (),
        )  # the row read last: image and caption of a sample are asked for in turn
        names, good, rows, lines = array("Q"), array("Q"), set(), 0  # hashes, so that a million rows stay small
        for number, start, line in self._read_lines():
            lines = number
            key = f"{METADATA}:{number}"
            try:
                name, value = self._parse(line)
                names.append(hash_of(name))
                texts = flat(wordings_in(value))
                if hash_of(name, *texts) in rows:
                    raise BadImage("repeats an earlier line")
                rows.add(hash_of(name, *texts))
                key = name
                with open_regular(os.path.join(self._root, os.fsencode(key))) as file:
                    self._admit(file, os.fsencode(key), *(t.encode() for t in texts))
            except BadImage as error:
                self._reject(key, error.reason)
                continue
            good.append(hash_of(key))
            self._note(key, *texts)
            self.several = self.several or len(texts) > 1
            self._starts.append(start)
            self._lengths.append(len(line))
        del rows
        if not lines:
            raise UserError(f"{self._metadata}: empty; expected one line per image with file_name and text")
        self._pass_over(np.unique(np.frombuffer(names, np.uint64)))
        self._finish(distinct=len(np.unique(np.frombuffer(good, np.uint64))))

    def _pass_over(self, named: np.ndarray) -> None:
        """Count what else is in the folder. `named`: sorted hashes of the file names in metadata.jsonl."""
        for folder, files in walk(self._root, {}):
            images = [folder + name for name in files if is_image(name) or is_other_image(name)]
            hashes = np.fromiter((hash_of(os.fsdecode(key)) for key in images), np.uint64, len(images))
            self.unnamed += int((~np.isin(hashes, named)).sum())
            self.ignored += len(files) - len(images) - (not folder and contains(files, os.fsencode(METADATA)))

    def _nothing(self) -> str:
        return (
            f"{self._metadata}: none of its lines is usable (line 1: {self.bad[0].reason}); "
            'expected one {"file_name": "a.jpg", "text": "a caption"} per line'
        )

    def _read_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, byte offset, line) of each line that is not blank."""
        try:
            file = open_regular(self._metadata)
        except BadImage as error:
            raise UserError(f"{self._metadata}: {error.reason}; expected one JSON object per line") from None
        with file:
            number, start = 0, 0
            while line := file.readline(_MAX_LINE):
                number += 1
                piece, end = line, start + len(line)
                while len(piece) == _MAX_LINE and not piece.endswith(b"\n"):  # too long to be a row: skipped, reported
                    piece = file.readline(_MAX_LINE)
                    end += len(piece)
                if not start and line.startswith(b"\xef\xbb\xbf"):
                    line, start = line[3:], 3
                if line.strip():
                    yield number, start, line
                start = end

    @staticmethod
    def _parse(line: bytes) -> tuple[str, object]:
        """(file name, what are to be its captions) of a line. Raises `BadImage`."""
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            raise BadImage("line is not UTF-8") from None
        except (ValueError, RecursionError):
            raise BadImage("line is not JSON") from None
        if not isinstance(row, dict):
            raise BadImage("line is not a JSON object")
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise BadImage("no file_name")
        return _inside(name), row.get("text")

    def _row(self, i: int) -> tuple[str, ...]:
        """(file name, *`flat` captions) of sample i; `UserError` if its line has changed since the index was made."""
        if i != self._last[0]:
            self._last = i, self._again(i, self._metadata, lambda: self._read_row(i))
        return self._last[1]

    def _read_row(self, i: int) -> tuple[str, ...]:
        name, value = self._parse(read_regular(self._metadata, self._starts[i], self._lengths[i]))
        return name, *flat(wordings_in(value))

    def key(self, i: int) -> str:
        return self._row(i)[0]

    def text(self, i: int) -> str:
        return self._row(i)[1]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._row(i)[1:])

    def read(self, i: int) -> bytes:
        return read_regular(os.path.join(self._root, os.fsencode(self.key(i))))


class PairedFolder(FileSource):
    """A folder, with folders in it or not, where a.jpg has its caption beside it in a.txt."""

    kind = ".txt beside the image"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._root = os.fsencode(path)
        self._keys = Strings()
        for folder, names in walk(self._root, self._bad):
            for name in names:
                key = folder + name
                try:
                    if is_image(name):
                        self._take(key, names, name)
                    elif is_other_image(name):
                        raise BadImage(_UNSUPPORTED)
                    elif suffix(name) == b".txt" and not has_image_named(names, os.path.splitext(name)[0]):
                        raise BadImage("caption without an image")
                    elif suffix(name) != b".txt":
                        self.ignored += 1
                except BadImage as error:
                    self._reject(os.fsdecode(key), error.reason)
        self._finish()

    def _take(self, key: bytes, names: list[bytes], name: bytes) -> None:
        if not contains(names, _caption_name(name)):
            raise BadImage("no caption")
        text = self._caption(key)
        with open_regular(os.path.join(self._root, key)) as file:
            self._admit(file, key, text.encode())
        self._note(text)
        self._keys.append(key)

    def _caption(self, key: bytes) -> str:
        try:
            with open_regular(os.path.join(self._root, _caption_name(key))) as file:
                return decode_caption(file.read(MAX_CAPTION + 1))
        except BadImage as error:
            raise BadImage(error.reason if "caption" in error.reason else f"caption: {error.reason}") from None

    def key(self, i: int) -> str:
        return os.fsdecode(self._keys[i])

    def text(self, i: int) -> str:
        key = self._keys[i]
        where = os.path.join(self.name, os.fsdecode(_caption_name(key)))
        return self._again(i, where, lambda: (self._caption(key),))[0]

    def read(self, i: int) -> bytes:
        return read_regular(os.path.join(self._root, self._keys[i]))


class ClassFolder(FileSource):
    """A folder with one folder per class. A sample's text is its label, a decimal; `classes[label]` is the name."""

    kind = "class folders"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._root = os.fsencode(path)
        self._keys = Strings()
        self._labels = array("i")
        classes: list[str] = []
        last = b""
        for folder, names in walk(self._root, self._bad):
            top = folder.split(b"/", 1)[0]
            for name in names:
                key = folder + name
                try:
                    if is_image(name):
                        if not top:
                            raise BadImage("not in the folder of a class")
                        if top != last:  # the walk is sorted: a class comes once, empty ones never
                            classes.append(self._class_name(top))
                            last = top
                        with open_regular(os.path.join(self._root, key)) as file:
                            self._admit(file, key, str(len(classes) - 1).encode())
                        self._keys.append(key)
                        self._labels.append(len(classes) - 1)
                    elif is_other_image(name):
                        raise BadImage(_UNSUPPORTED)
                    else:
                        self.ignored += 1
                except BadImage as error:
                    self._reject(os.fsdecode(key), error.reason)
        self.classes = tuple(classes)
        self._finish()

    def _class_name(self, folder: bytes) -> str:
        """The name of a class's folder; UserError if it is no text: checkpoints keep it as text."""
        try:
            return folder.decode()
        except UnicodeDecodeError:
            raise UserError(
                f"{self.name}: the class folder {folder!r} has a name that is not UTF-8, and a checkpoint keeps the "
                "names of its classes: rename the folder"
            ) from None

    def key(self, i: int) -> str:
        return os.fsdecode(self._keys[i])

    def text(self, i: int) -> str:
        return str(self._labels[i])

    def read(self, i: int) -> bytes:
        return read_regular(os.path.join(self._root, self._keys[i]))


def folder_kind(path: str) -> type[FileSource]:
    """Which kind a folder without metadata.jsonl is. Raises `UserError` if its captions are in no form that we know."""
    loose = nested = 0
    for folder, names in walk(os.fsencode(path), {}):
        if contains(names, os.fsencode(METADATA)):
            below = os.path.join(path, os.fsdecode(folder[:-1]))
            raise UserError(f"{path}: its captions are in {os.path.join(below, METADATA)}; name {below} as the source")
        images = [name for name in names if is_image(name)]
        if any(contains(names, _caption_name(name)) for name in images):
            return PairedFolder
        loose, nested = loose + (0 if folder else len(images)), nested + (len(images) if folder else 0)
    if nested > loose:
        return ClassFolder
    if not loose + nested:
        raise UserError(f"{path}: no images in it; expected JPEG, PNG or WebP files, or tar shards")
    raise UserError(
        f"{path}: {loose + nested} images with captions in no known form; expected a {METADATA} with file_name and "
        "text, a .txt beside each image, or one folder per class"
    )


def _caption_name(name: bytes) -> bytes:
    return os.path.splitext(name)[0] + b".txt"


def _inside(name: str) -> str:
    """A file name of the metadata in its plainest form. Raises `BadImage` if it leads out of the folder."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain) or plain == ".." or plain.startswith("../"):
        raise BadImage("path leaves the folder")
    try:
        os.fsencode(plain)
    except UnicodeEncodeError:
        raise BadImage("file name is not valid Unicode") from None
    return plain
