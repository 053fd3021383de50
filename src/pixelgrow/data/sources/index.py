"""What every source of files shares: a compact index filled by one scan of the headers."""

import io
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from pixelgrow.data.images import FRAME, OUR_FAULT, BadImage, Frame, read_header, read_image
from pixelgrow.data.sources.base import BadFile, PassedOver, Wording
from pixelgrow.data.sources.captions import Captions, flat
from pixelgrow.data.sources.identity import fingerprint_of, hash_of, print_of
from pixelgrow.data.sources.names import UNCAPTIONED
from pixelgrow.errors import UserError

log = logging.getLogger(__name__)
NEITHER = "neither image nor caption"
CAPTIONS = "caption files, not read in a source of this kind"
FURTHER = "further images of captioned samples"
UNNAMED = "images without a line in the metadata"
BESIDE = "images beside the shards"
LOOSE = "not in the folder of a class"
VECTOR = "vector graphics (SVG), which are not drawn"
IMAGES = {FURTHER, UNNAMED, BESIDE, LOOSE, UNCAPTIONED, VECTOR}
LINES = "caption files of several lines, each a caption"
LANGUAGES = "lines in other languages in them, left out"


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
    """Base of the sources of files. A subclass scans its files once, in `__init__`.

    It calls `_admit` for each candidate, `_reject` for a fault, `_pass_over` for what is neither, then `_finish`.
    Captions stay in their files: `_note` keeps a hash of what was read, and `_again` reads it once more and compares.
    """

    kind = "files"
    guess = ""  # what `opening` assumed when it chose this kind of source, and how to say something else
    classes: tuple[str, ...] = ()
    several = False  # whether a sample has more than one caption

    def __init__(self, path: str) -> None:
        self.name = path
        self.fingerprint = ""
        self.sizes = np.zeros((0, 2), np.int32)  # (N, 2), (h, w)
        self.clear = np.zeros(0, np.bool_)  # (N,), which images have transparency
        self.frame = FRAME
        self.prints = np.zeros(0, np.uint64)  # (N,), a hash of each sample (`identity`)
        self.bad: tuple[BadFile, ...] = ()
        self.passed: tuple[PassedOver, ...] = ()
        self.strays: tuple[BadFile, ...] = ()  # of those passed over, files that somebody may want to know by name
        self.notes: tuple[tuple[str, int], ...] = ()  # what else to know about its files, and of how many it is true
        self.files = 0  # distinct images, with those that are bad or lost
        self._notes: dict[str, int] = {}
        self._passed: dict[str, PassedOver] = {}
        self._sizes, self._prints, self._clear = array("i"), array("Q"), array("B")
        self._noted = array("Q")
        self._bad: dict[str, BadFile] = {}
        self._strays: list[BadFile] = []

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
        return read_image(io.BytesIO(self.read(i)), size, crop, self.frame)

    def lay(self, frame: Frame) -> None:
        """Lay the images out as `frame` says, once, before anything else is asked of the source.

        One that is padded counts as a square of its longer side. Images in another frame are other data: the
        fingerprint says so.
        """
        self.frame = frame
        self.fingerprint = fingerprint_of(self.prints, frame.mark)
        if frame.fit == "pad":
            oblong = int((self.sizes[:, 0] != self.sizes[:, 1]).sum())
            self.sizes = self.sizes.max(axis=1, keepdims=True).repeat(2, axis=1)
            self.notes += ((f"images that are not square, padded with {frame.ground}", oblong),)

    def _admit(self, file: BinaryIO, *about: bytes) -> None:
        """Read the header of a candidate and take its size into the index. Raises `BadImage`, then nothing is taken.

        `about`: what identifies the sample beside its image (key, captions), for the fingerprint.
        """
        header = read_header(file)
        try:
            one = print_of(file, *about)
        except OSError as error:
            if error.errno in OUR_FAULT:
                raise
            raise BadImage((error.strerror or str(error)).lower()) from None
        self._sizes.extend(header.size)
        self._prints.append(one)
        self._clear.append(header.transparent)
        if len(self._sizes) % 400_000 == 0:
            log.info("%s: %d images so far", self.name, len(self._sizes) // 2)

    def _note(self, captions: Captions, *said: str) -> None:
        """Keep a hash of what was read about the sample that was just admitted: `said` and its captions."""
        self._noted.append(hash_of(*said, *flat(captions.wordings)))
        self.several = self.several or len(captions.wordings) > 1
        self._count(LINES, int(captions.lines > 1))
        self._count(LANGUAGES, captions.foreign)

    def _again(self, i: int, where: str, read: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """Read what the file `where` has for sample i again, by `read()`; `UserError` if it has changed."""
        try:
            said = read()
        except BadImage as error:
            reason = error.reason
        else:
            if hash_of(*said) == self._noted[i]:
                return said
            reason = "another caption of an image"
        raise UserError(
            f"{where}: changed since the run began ({reason}); put it back as it was, or run under another name"
        )

    def _reject(self, key: str, reason: str, samples: int = 1) -> None:
        """List a file that cannot be used, once. `samples`: how many are lost with it."""
        if key not in self._bad:
            self._bad[key] = BadFile(key, reason, samples)

    def _pass_over(self, reason: str, key: str, count: int = 1) -> None:
        """Count files that are no samples and no faults; `key` is the first."""
        before = self._passed.get(reason, PassedOver(reason, 0, key, reason in IMAGES))
        self._passed[reason] = replace(before, count=before.count + count)

    def _stray(self, key: str, reason: str) -> None:
        """Pass over a file and list it."""
        self._pass_over(reason, key)
        self._strays.append(BadFile(key, reason))

    def _count(self, note: str, count: int = 1) -> None:
        """Count what `notes` says."""
        self._notes[note] = self._notes.get(note, 0) + count

    def _finish(self, distinct: int | None = None) -> None:
        """Close the index. `distinct`: the number of distinct good files, if not the number of samples."""
        self.sizes = np.frombuffer(self._sizes, dtype=np.int32).reshape(-1, 2) if self._sizes else self.sizes
        self.clear = np.frombuffer(self._clear, dtype=np.bool_) if self._clear else self.clear
        self.bad, self.passed = tuple(self._bad.values()), tuple(self._passed.values())
        self.strays = tuple(self._strays)
        self.notes = tuple((note, count) for note, count in self._notes.items() if count)
        self.files = (len(self.sizes) if distinct is None else distinct) + sum(bad.samples for bad in self.bad)
        self.prints = np.frombuffer(self._prints, dtype=np.uint64) if self._prints else self.prints
        self.fingerprint = fingerprint_of(self.prints)
        del self._sizes, self._prints, self._clear, self._bad, self._passed, self._strays, self._notes
        if not len(self.sizes):
            raise UserError(self._nothing())
        for passed in self.passed:
            if passed.reason == UNCAPTIONED and passed.count > len(self.sizes):
                raise UserError(
                    f"{self.name}: {passed.count:,} images have no caption (such as {passed.example}) and "
                    f"{len(self.sizes):,} have one: caption them, or move them elsewhere"
                )

    def _nothing(self) -> str:
        if not self.bad:
            found = "; ".join(f"{p.reason}: {p.count:,}, such as {p.example}" for p in self.passed)
            found = f" ({found})" if found else ""
            return f"{self.name}: no samples in it{found}; expected JPEG, PNG or WebP files with captions"
        first = self.bad[0]
        return (
            f"{self.name}: none of its {len(self.bad)} files is usable (first: {first.key}: {first.reason}); "
            "expected JPEG, PNG or WebP images with captions"
        )
