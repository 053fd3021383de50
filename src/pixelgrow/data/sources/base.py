"""What a source of captioned images is, and views of one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pixelgrow.data.images import FRAME, Frame
from pixelgrow.errors import UserError


class Source(Protocol):
    """Captioned images by number; every answer is a function of the number alone.

    `name` is for messages, `fingerprint` a hash of what the source holds (`identity`, or its parameters).
    A source of files also has `sizes` (N, 2) int32 of (h, w), `clear` (N,) bool (which images have transparency) and
    the `frame` that they are laid out in, `bad` (what its index had to leave out), `passed` (files that are no samples
    and no faults) and `files` (the number of distinct images, bad and lost ones included). A source
    of classes has `classes`, the names of its labels. One whose captions say left and right has `mirror` False: its
    images are never mirrored. One with `several` True has samples of more than one caption, all of them in
    `wordings(i)`.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def size(self, i: int) -> tuple[int, int]:
        """(h, w) of the original in pixels, after EXIF orientation, from the header alone."""
        ...

    def text(self, i: int) -> str:
        """The caption, the first if there are several; the decimal label for a source of classes."""
        ...

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        """uint8 (h, w, 3), smallest side scaled to `size` and cropped at fraction `crop` (y, x) of the slack.

        Raises `BadImage`, as a property of the file alone.
        """
        ...

    def key(self, i: int) -> str:
        """File name or tar member."""
        ...


@dataclass(frozen=True)
class Wording:
    """One of the captions of a sample, trained on in proportion to `weight`."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and why. `samples`: how many are lost with it, an estimate for a damaged shard."""

    key: str
    reason: str
    samples: int = 1


@dataclass(frozen=True)
class PassedOver:
    """`count` files that are no samples and no faults, for one `reason`; `example` is the first. `images`: they are."""

    reason: str
    count: int
    example: str
    images: bool = False


class Subset:
    """A view of some samples of a source. `indices` (M,) are numbers of the parent, in the order of the view."""

    def __init__(self, parent: Source, indices: np.ndarray, name: str) -> None:
        self.parent = parent
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = name
        digest = hashlib.blake2b(self.indices.tobytes(), digest_size=8).hexdigest()
        self.fingerprint = f"{parent.fingerprint}-{digest}"
        self.bad: Sequence[BadFile] = bad_of(parent)
        self.passed: Sequence[PassedOver] = passed_of(parent)
        self.strays: Sequence[BadFile] = strays_of(parent)
        self.files = files_of(parent)
        self.classes: tuple[str, ...] = getattr(parent, "classes", ())
        self.mirror: bool = getattr(parent, "mirror", True)
        self.several: bool = getattr(parent, "several", False)
        self.frame: Frame = getattr(parent, "frame", FRAME)

    @property
    def sizes(self) -> np.ndarray:
        return sizes_of(self.parent)[self.indices]

    @property
    def clear(self) -> np.ndarray:
        return clear_of(self.parent)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def size(self, i: int) -> tuple[int, int]:
        return self.parent.size(int(self.indices[i]))

    def text(self, i: int) -> str:
        return self.parent.text(int(self.indices[i]))

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_of(self.parent, int(self.indices[i]))

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        return self.parent.image(int(self.indices[i]), size, crop)

    def key(self, i: int) -> str:
        return self.parent.key(int(self.indices[i]))


def wordings_of(source: Source, i: int) -> tuple[Wording, ...]:
    """All captions of a sample."""
    wordings: Callable[[int], tuple[Wording, ...]] | None = getattr(source, "wordings", None)
    return (Wording(source.text(i)),) if wordings is None else wordings(i)


def chosen(wordings: Sequence[Wording], u: float) -> int:
    """The index of the caption that u in [0, 1) chooses, each in proportion to its weight."""
    ends = np.cumsum([w.weight for w in wordings])
    return min(int(np.searchsorted(ends, u * ends[-1], side="right")), len(wordings) - 1)


def sizes_of(source: Source) -> np.ndarray:
    """All original sizes, (N, 2) int32 of (h, w)."""
    sizes = getattr(source, "sizes", None)
    if isinstance(sizes, np.ndarray):
        return sizes
    flat = (side for i in range(len(source)) for side in source.size(i))
    return np.fromiter(flat, dtype=np.int32, count=2 * len(source)).reshape(-1, 2)


def clear_of(source: Source) -> np.ndarray:
    """Which images have transparency, (N,) bool; none of a source without files."""
    clear = getattr(source, "clear", None)
    return clear if isinstance(clear, np.ndarray) else np.zeros(len(source), np.bool_)


def ground_of(source: Source) -> str:
    """The colour behind transparent parts of a source's images."""
    frame: Frame = getattr(source, "frame", FRAME)
    return frame.ground


def bad_of(source: Source) -> Sequence[BadFile]:
    """The files that the source's index left out; nothing for a source without files."""
    return getattr(source, "bad", ())


def strays_of(source: Source) -> Sequence[BadFile]:
    """The files that the source's index passed over one by one: they are listed, and no fault."""
    return getattr(source, "strays", ())


def lost_in_shards(source: Source) -> int:
    """How many samples damaged shards lack, by estimate, beside one for each shard."""
    return sum(bad.samples - 1 for bad in bad_of(source))


def passed_of(source: Source) -> Sequence[PassedOver]:
    """The files that the source's index passed over: no samples, and no faults."""
    return getattr(source, "passed", ())


def passed_images(source: Source) -> int:
    """How many images the source's index passed over."""
    return sum(passed.count for passed in passed_of(source) if passed.images)


def files_of(source: Source) -> int:
    """The number of distinct images of a source, those that are bad or lost included."""
    return getattr(source, "files", len(source))


def large_enough(source: Source, size: tuple[int, int]) -> np.ndarray:
    """Numbers (M,) int64 of the samples whose original is at least `size` (h, w) on both sides."""
    sizes = sizes_of(source)
    return np.flatnonzero((sizes[:, 0] >= size[0]) & (sizes[:, 1] >= size[1]))


HELD_OUT_AT_MOST, HELD_OUT_AT_LEAST = 10_000, 16  # images


def heldout_split(
    source: Source,
    fraction: float = 0.02,
    seed: int = 0,
    at_least: int = HELD_OUT_AT_LEAST,
    at_most: int = HELD_OUT_AT_MOST,
) -> tuple[Subset, Subset]:
    """(train view, held-out view), disjoint, by a hash of each sample's key.

    Holds out `fraction` * N samples, no fewer than `at_least`, no more than `at_most`, and at most half. Samples with
    one key (two captions of one file) fall on the same side, and adding files moves few others. Raises `UserError` for
    fewer than two keys.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction: got {fraction}, expected a number between 0 and 1; the default is 0.02")
    hashes = np.fromiter((_hash(seed, source.key(i)) for i in range(len(source))), dtype=np.uint64, count=len(source))
    order = np.sort(hashes)
    if len(order) < 2 or order[0] == order[-1]:
        raise UserError(f"{source.name}: {len(order)} usable image(s), too few to hold some out; add images")
    count = min(max(round(fraction * len(order)), at_least), at_most, len(order) // 2)
    held = hashes <= order[count - 1]
    if held.all():
        held = hashes < order[-1]
    return (
        Subset(source, np.flatnonzero(~held), f"{source.name} (train)"),
        Subset(source, np.flatnonzero(held), f"{source.name} (held out)"),
    )


def _hash(seed: int, key: str) -> int:
    data = f"{seed}\0{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
