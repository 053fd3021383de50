"""What every source of files shares: what one scan of the headers finds, and the samples by number."""

import io
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO, Protocol

import numpy as np

from pixelgrow.data.images import FRAME, OUR_FAULT, BadImage, Frame, read_header, read_image
from pixelgrow.data.sources.base import BadFile, Lanes, PassedOver, Wording
from pixelgrow.data.sources.captions import Captions, flat
from pixelgrow.data.sources.identity import digest_of, fingerprint_of, hash_of, print_of
from pixelgrow.data.sources.names import UNCAPTIONED
from pixelgrow.data.sources.selection import chunks
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


class Scan:
    """What a scan of files finds: of each sample what its header says and a hash; what is bad, and what passed over.

    For each candidate call `admit`, for a fault `reject`, for what is neither `pass_over`. `name`: of the source, for
    messages.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.sizes, self.prints, self.clear = array("i"), array("Q"), array("B")  # (h, w) in turn; `identity`; 0 or 1
        self.noted = array("Q")
        self.bad: dict[str, BadFile] = {}
        self.passed: dict[str, PassedOver] = {}
        self.strays: list[BadFile] = []
        self.notes: dict[str, int] = {}
        self.several = False  # whether a sample has more than one caption

    def __len__(self) -> int:
        return len(self.prints)

    def admit(self, file: BinaryIO, *about: bytes) -> None:
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
        self.sizes.extend(header.size)
        self.prints.append(one)
        self.clear.append(header.transparent)
        if self.name and len(self) % 200_000 == 0:
            log.info("%s: %d images so far", self.name, len(self))

    def note(self, captions: Captions, *said: str) -> None:
        """Keep a hash of what was read about the sample that was just admitted: `said` and its captions."""
        self.noted.append(hash_of(*said, *flat(captions.wordings)))
        self.several = self.several or len(captions.wordings) > 1
        self.count(LINES, int(captions.lines > 1))
        self.count(LANGUAGES, captions.foreign)

    def reject(self, key: str, reason: str, samples: int = 1) -> None:
        """List a file that cannot be used, once. `samples`: how many are lost with it."""
        if key not in self.bad:
            self.bad[key] = BadFile(key, reason, samples)

    def pass_over(self, reason: str, key: str, count: int = 1) -> None:
        """Count files that are no samples and no faults; `key` is the first."""
        before = self.passed.get(reason, PassedOver(reason, 0, key, reason in IMAGES))
        self.passed[reason] = replace(before, count=before.count + count)

    def stray(self, key: str, reason: str) -> None:
        """Pass over a file and list it."""
        self.pass_over(reason, key)
        self.strays.append(BadFile(key, reason))

    def count(self, note: str, count: int = 1) -> None:
        """Count what `notes` says."""
        self.notes[note] = self.notes.get(note, 0) + count


class Columns(Protocol):
    """What is known of each sample of a source; a slice has no step. Each call may read it from the disk."""

    def __len__(self) -> int: ...
    def sizes(self, part: slice) -> np.ndarray:
        """(n, 2) int32 of (h, w)."""
        ...

    def clear(self, part: slice) -> np.ndarray:
        """(n,) bool, which images have transparency."""
        ...

    @property
    def prints(self) -> np.ndarray:
        """(N,) uint64, a hash of each sample (`identity`)."""
        ...

    @property
    def digest(self) -> str:
        """`identity.digest_of` the prints."""
        ...


class InMemory:
    """Columns that a scan has filled."""

    def __init__(self, scan: Scan) -> None:
        self._sizes = np.array(scan.sizes, np.int32).reshape(-1, 2)
        self._clear = np.array(scan.clear, np.bool_)
        self.prints = np.array(scan.prints, np.uint64)
        self.digest = digest_of(self.prints)

    def __len__(self) -> int:
        return len(self.prints)

    def sizes(self, part: slice) -> np.ndarray:
        return self._sizes[part]

    def clear(self, part: slice) -> np.ndarray:
        return self._clear[part]


class FileSource(ABC):
    """Base of the sources of files. A subclass looks at its files once, in `__init__`, by a `Scan`, then `_finish`es.

    Captions of folders stay in their files: `Scan.note` keeps a hash of what was read, and `_again` reads it once more
    and compares.
    """

    kind = "files"
    guess = ""  # what `opening` assumed when it chose this kind of source, and how to say something else
    classes: tuple[str, ...] = ()
    several = False  # whether a sample has more than one caption
    lanes: Lanes | None = None  # of a source that is read shard by shard

    def __init__(self, path: str) -> None:
        self.name = path
        self.fingerprint = ""
        self.frame = FRAME
        self.bad: tuple[BadFile, ...] = ()
        self.passed: tuple[PassedOver, ...] = ()
        self.strays: tuple[BadFile, ...] = ()  # of those passed over, files that somebody may want to know by name
        self.notes: tuple[tuple[str, int], ...] = ()  # what else to know about its files, and of how many it is true
        self.files = 0  # distinct images, with those that are bad or lost
        self._columns: Columns = InMemory(Scan())
        self._noted = array("Q")

    def __len__(self) -> int:
        return len(self._columns)

    def sides(self, part: slice) -> np.ndarray:
        """(n, 2) int32 of (h, w) of the samples of a part; an image that is padded counts as a square."""
        sizes = self._columns.sizes(part)
        return sizes.max(axis=1, keepdims=True).repeat(2, axis=1) if self.frame.fit == "pad" else sizes

    def clears(self, part: slice) -> np.ndarray:
        """(n,) bool, which images of a part have transparency."""
        return self._columns.clear(part)

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32 of (h, w); of many samples ask for `sides` part by part."""
        return self.sides(slice(0, len(self)))

    @property
    def prints(self) -> np.ndarray:
        """(N,) uint64, a hash of each sample (`identity`)."""
        return self._columns.prints

    def size(self, i: int) -> tuple[int, int]:
        ((h, w),) = self.sides(slice(i, i + 1)).tolist()
        return h, w

    def keys(self) -> Iterator[str]:
        """The keys of all samples in order."""
        return (self.key(i) for i in range(len(self)))

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

        Images in another frame are other data: the fingerprint says so.
        """
        self.frame = frame
        self.fingerprint = fingerprint_of(self._columns.digest, frame.mark)
        if frame.fit == "pad":
            parts = map(self._columns.sizes, chunks(len(self)))
            oblong = sum(int((sizes[:, 0] != sizes[:, 1]).sum()) for sizes in parts)
            self.notes += ((f"images that are not square, padded with {frame.ground}", oblong),)

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
        raise changed(where, reason)

    def _finish(self, scan: Scan, columns: Columns | None = None, distinct: int | None = None) -> None:
        """Take over what a scan has found. `columns`: those of its samples, if they are not in memory.

        `distinct`: the number of distinct good files, if not the number of samples.
        """
        self._columns = columns or InMemory(scan)
        self._noted, self.several = scan.noted, scan.several
        self.bad, self.passed, self.strays = tuple(scan.bad.values()), tuple(scan.passed.values()), tuple(scan.strays)
        self.notes = tuple((note, count) for note, count in scan.notes.items() if count)
        self.files = (len(self) if distinct is None else distinct) + sum(bad.samples for bad in self.bad)
        self.fingerprint = fingerprint_of(self._columns.digest)
        if not len(self):
            raise UserError(self._nothing())
        for passed in self.passed:
            if passed.reason == UNCAPTIONED and passed.count > len(self):
                raise UserError(
                    f"{self.name}: {passed.count:,} images have no caption (such as {passed.example}) and "
                    f"{len(self):,} have one: caption them, or move them elsewhere"
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


def changed(where: str, reason: str) -> UserError:
    """The error of data that are not what they were when the run began."""
    return UserError(
        f"{where}: changed since the run began ({reason}); put it back as it was, or run under another name"
    )
