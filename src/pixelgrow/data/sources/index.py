"""What every source of files shares: a compact index filled by one scan of the headers."""

import io
import logging
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from pixelgrow.data.images import OUR_FAULT, BadImage, read_header, read_image
from pixelgrow.data.sources.base import BadFile, Wording
from pixelgrow.data.sources.identity import fingerprint_of, hash_of, print_of
from pixelgrow.errors import UserError

log = logging.getLogger(__name__)
MAX_CAPTION = 1 << 16  # bytes


class Strings:
    """Many byte strings in one blob: 8 bytes and the string itself each, no objects."""

    def __init__(self) -> None:
        self.blob = bytearray()
        self.ends = array("q")

    def append(self, value: bytes) -> None:
        self.blob += value
        self.ends.append(len(self.blob))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]])


class FileSource(ABC):
    """Base of the sources of files. A subclass scans its files once, in `__init__`:

    `_admit(file, ...)` for each candidate, `_reject` for what cannot be one, then `_finish`. What stays in files, of a
    caption, is noted by `_note` and read again by `_again`, which sees that it is the same.
    """

    kind = "files"
    classes: tuple[str, ...] = ()
    several = False  # whether a sample has more than one caption

    def __init__(self, path: str) -> None:
        self.name = path
        self.fingerprint = ""
        self.sizes = np.zeros((0, 2), np.int32)  # (N, 2), (h, w)
        self.prints = np.zeros(0, np.uint64)  # (N,), a hash of each sample (`identity`)
        self.bad: tuple[BadFile, ...] = ()
        self.files = 0
        self.ignored = 0  # files that claim to be neither image nor caption
        self.unnamed = 0  # images that stand in no line of the captions' file
        self._sizes, self._prints = array("i"), array("Q")
        self._noted = array("Q")
        self._bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, i: int) -> tuple[int, int]:
        h, w = self.sizes[i]
        return int(h), int(w)

    @abstractmethod
    def text(self, i: int) -> str:
        """The caption of sample i. Raises `UserError` if it is not what it was when the index was made."""

    def wordings(self, i: int) -> tuple[Wording, ...]:
        """All captions of sample i. Raises `UserError` as `text` does."""
        return (Wording(self.text(i)),)

    @abstractmethod
    def key(self, i: int) -> str:
        """The file of sample i, as `bad_files.jsonl` names it."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The bytes of image i, undecoded. Raises `BadImage` if they have gone since the scan."""

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        return read_image(io.BytesIO(self.read(i)), size, crop)

    def _admit(self, file: BinaryIO, *about: bytes) -> None:
        """Read the header of a candidate and take its size into the index. Raises `BadImage`, then nothing is taken.

        `about`: what identifies the sample beside its image (key, captions), for the fingerprint.
        """
        h, w = read_header(file).size
        try:
            one = print_of(file, *about)
        except OSError as error:
            if error.errno in OUR_FAULT:
                raise
            raise BadImage((error.strerror or str(error)).lower()) from None
        self._sizes.extend((h, w))
        self._prints.append(one)
        if len(self._sizes) % 400_000 == 0:
            log.info("%s: %d images so far", self.name, len(self._sizes) // 2)

    def _note(self, *said: str) -> None:
        """Keep a hash of what the captions' file says of the sample that was just admitted."""
        self._noted.append(hash_of(*said))

    def _again(self, i: int, where: str, read: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """`read()`: what the captions' file `where` says of sample i; `UserError` if it said something else before."""
        try:
            said = read()
        except BadImage as error:
            reason = error.reason
        else:
            if hash_of(*said) == self._noted[i]:
                return said
            reason = "it says something else of an image"
        raise UserError(
            f"{where}: changed since the run began ({reason}); put it back as it was, or run under another name"
        )

    def _reject(self, key: str, reason: str) -> None:
        """List a file that is no sample, once."""
        if key not in self._bad:
            self._bad[key] = reason

    def _finish(self, distinct: int | None = None) -> None:
        """Close the index. `distinct`: the number of distinct good files, if not the number of samples."""
        self.sizes = np.frombuffer(self._sizes, dtype=np.int32).reshape(-1, 2) if self._sizes else self.sizes
        self.bad = tuple(BadFile(key, reason) for key, reason in self._bad.items())
        self.files = (len(self.sizes) if distinct is None else distinct) + len(self.bad)
        self.prints = np.frombuffer(self._prints, dtype=np.uint64) if self._prints else self.prints
        self.fingerprint = fingerprint_of(self.prints)
        del self._sizes, self._prints, self._bad
        if not len(self.sizes):
            raise UserError(self._nothing())

    def _nothing(self) -> str:
        if not self.bad:
            return f"{self.name}: no images in it; expected JPEG, PNG or WebP files with captions"
        first = self.bad[0]
        return (
            f"{self.name}: none of its {len(self.bad)} files is usable (first: {first.key}: {first.reason}); "
            "expected JPEG, PNG or WebP images with captions"
        )


def caption_of(value: object) -> str:
    """A caption as one line of clean text. Raises `BadImage` for what is no text, or empty, or longer than 64 KiB."""
    if value is None:
        raise BadImage("no caption")
    if not isinstance(value, str):
        raise BadImage(f"caption is {type(value).__name__}, not text")
    text = " ".join(value.replace("\0", " ").split())
    if not text:
        raise BadImage("empty caption")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadImage("caption is not valid Unicode") from None
    if size > MAX_CAPTION:
        raise BadImage("caption longer than 64 KiB")
    return text


def wordings_in(value: object) -> tuple[Wording, ...]:
    """The captions that a row says: a text, or a list of texts and of `{"text": ..., "weight": ...}`; a weight is 1
    where none is said. Raises `BadImage`."""
    if not isinstance(value, list):
        return (Wording(caption_of(value)),)
    if not value:
        raise BadImage("empty list of captions")
    found = []
    for item in value:
        weight: object = 1.0
        if isinstance(item, dict):
            weight, item = item.get("weight", 1.0), item.get("text")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise BadImage(f"caption weight is {weight!r}, not a number above 0")
        found.append(Wording(caption_of(item), float(weight)))
    return tuple(found)


def flat(wordings: Sequence[Wording]) -> tuple[str, ...]:
    """Captions as strings, for an index: the text of one; of several texts and weights in turn."""
    if len(wordings) == 1:
        return (wordings[0].text,)
    return tuple(part for w in wordings for part in (w.text, repr(w.weight)))


def wordings_from(strings: Sequence[str]) -> tuple[Wording, ...]:
    """The captions that `flat` made `strings` of."""
    if len(strings) == 1:
        return (Wording(strings[0]),)
    return tuple(Wording(text, float(weight)) for text, weight in zip(strings[::2], strings[1::2], strict=True))


def decode_caption(raw: bytes) -> str:
    """The bytes of a caption file as one line of clean text. Raises `BadImage`."""
    if len(raw) > MAX_CAPTION:
        raise BadImage("caption longer than 64 KiB")
    try:
        return caption_of(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadImage("caption is not UTF-8") from None
