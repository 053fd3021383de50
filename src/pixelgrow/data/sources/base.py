"""What a source of captioned images is, and views of one."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pixelgrow.data.images import FRAME, Frame
from pixelgrow.data.sources.selection import CHUNK, Selection, chunks
from pixelgrow.errors import UserError


class Source(Protocol):
    """Captioned images by number; every answer is a function of the number alone.

    `name` is for messages, `fingerprint` a hash of what the source holds (`identity`, or its parameters).
    A source of files also has `sides(part)` (n, 2) int32 of (h, w) and `clears(part)` (n,) bool (which images have
    transparency) of the samples in a slice, the `frame` that they are laid out in, `bad` (what its index had to leave
    out), `passed` (files that are no samples and no faults) and `files` (the number of distinct images, bad and lost
    ones included). A source of many files has `least(seed, count)`, the hashes of its keys (`least_of`). A source of
    classes has `classes`, the names of its labels. One whose captions say left and right has `mirror` False: its
    images are never mirrored. One with `several` True has samples of more than one caption, all of them in
    `wordings(i)`. One that is read shard by shard has `lanes`, and `cuts` (S + 1,), the number of its samples before
    each shard and of all; `hold(now, ahead)`, if it fetches shards, says which are needed now and next.
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
class Lanes:
    """How a source of shards is read in training: in `count` lanes, each of which shuffles `window` shards at a time
    (`data.lanes`)."""

    count: int = 8
    window: int = 4


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

    def __init__(self, parent: Source, indices: np.ndarray | Selection, name: str) -> None:
        self.parent = parent
        self.indices = indices if isinstance(indices, Selection) else np.asarray(indices, dtype=np.int64)
        self.name = name
        digest = hashlib.blake2b(digest_size=8)
        for part in chunks(len(self.indices)):
            digest.update(self.indices[part].tobytes())
        self.fingerprint = f"{parent.fingerprint}-{digest.hexdigest()}"
        self.bad: Sequence[BadFile] = bad_of(parent)
        self.passed: Sequence[PassedOver] = passed_of(parent)
        self.strays: Sequence[BadFile] = strays_of(parent)
        self.files = files_of(parent)
        self.classes: tuple[str, ...] = getattr(parent, "classes", ())
        self.mirror: bool = getattr(parent, "mirror", True)
        self.several: bool = getattr(parent, "several", False)
        self.frame: Frame = getattr(parent, "frame", FRAME)
        self.lanes: Lanes | None = getattr(parent, "lanes", None)

    @property
    def cuts(self) -> np.ndarray:
        """Of a parent with lanes, whose samples stand in its order."""
        cuts: np.ndarray = self.parent.cuts  # type: ignore[attr-defined]
        if isinstance(self.indices, Selection):
            return self.indices.rank(cuts)
        return np.searchsorted(self.indices, cuts)

    def hold(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        hold(self.parent, now, ahead)

    def sides(self, part: slice) -> np.ndarray:
        return self._of_parent(sides_of, part)

    def clears(self, part: slice) -> np.ndarray:
        return self._of_parent(clears_of, part)

    def _of_parent(self, column: Callable[[Source, slice], np.ndarray], part: slice) -> np.ndarray:
        """A column of the parent for a part of the view; what lies between its samples is read as well."""
        numbers = self.indices[part]
        first, last = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, -1)
        return column(self.parent, slice(first, last + 1))[numbers - first]

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


def hold(source: Source, now: Sequence[int], ahead: Sequence[int]) -> None:
    """Say which shards of a source are needed now, and which soon. All others may go."""
    held: Callable[[Sequence[int], Sequence[int]], None] | None = getattr(source, "hold", None)
    if held is not None:
        held(now, ahead)


def chosen(wordings: Sequence[Wording], u: float) -> int:
    """The index of the caption that u in [0, 1) chooses, each in proportion to its weight."""
    ends = np.cumsum([w.weight for w in wordings])
    return min(int(np.searchsorted(ends, u * ends[-1], side="right")), len(wordings) - 1)


def sides_of(source: Source, part: slice) -> np.ndarray:
    """Original sizes (n, 2) int32 of (h, w) of the samples in a part."""
    sides: Callable[[slice], np.ndarray] | None = getattr(source, "sides", None)
    if sides is not None:
        return sides(part)
    flat = (side for i in range(*part.indices(len(source))) for side in source.size(i))
    return np.fromiter(flat, dtype=np.int32).reshape(-1, 2)


def sizes_of(source: Source) -> np.ndarray:
    """All original sizes, (N, 2) int32 of (h, w)."""
    return sides_of(source, slice(0, len(source)))


def clears_of(source: Source, part: slice) -> np.ndarray:
    """Which images of a part have transparency, (n,) bool; none of a source without files."""
    clears: Callable[[slice], np.ndarray] | None = getattr(source, "clears", None)
    return np.zeros(part.stop - part.start, np.bool_) if clears is None else clears(part)


def clear_among(source: Source, chosen: Selection | None = None) -> int:
    """How many samples, or how many of the chosen ones, have transparency."""
    parts = ((clears_of(source, part), part) for part in chunks(len(source)))
    return sum(int((clear if chosen is None else clear & chosen.mask(part)).sum()) for clear, part in parts)


def ground_of(source: Source) -> str:
    """The colour behind transparent parts of a source's images."""
    frame: Frame = getattr(source, "frame", FRAME)
    return frame.ground


def in_buckets(source: Source) -> bool:
    """Whether a source's images are in buckets (`data.buckets`)."""
    frame: Frame = getattr(source, "frame", FRAME)
    return frame.buckets


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


def large_enough(source: Source, size: tuple[int, int]) -> Selection:
    """Numbers of the samples whose original is at least `size` (h, w) on both sides."""
    parts = (sides_of(source, part) for part in chunks(len(source)))
    return Selection(len(source), ((sides[:, 0] >= size[0]) & (sides[:, 1] >= size[1]) for sides in parts))


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
    total = len(source)
    count = min(max(round(fraction * total), at_least), at_most, total // 2)
    hashes, numbers = least_of(source, seed, max(count, 1))
    if total < 2 or (len(numbers) == total and hashes[0] == hashes[-1]):
        raise UserError(f"{source.name}: {total} usable image(s), too few to hold some out; add images")
    held = hashes <= hashes[count - 1]
    if held.sum() == total:
        held = hashes < hashes[-1]
    part = np.sort(numbers[held])
    return (
        Subset(source, Selection.but(total, part), f"{source.name} (train)"),
        Subset(source, part, f"{source.name} (held out)"),
    )


def least_of(source: Source, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, numbers) of the samples with the least hashes of their keys: `count` of them, those whose hash equals
    the last of these, and maybe more, in ascending order of their hashes. All, if fewer."""
    least: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = getattr(source, "least", None)
    if least is not None:
        return least(seed, count)
    return least_hashes((source.key(i) for i in range(len(source))), seed, count)


def least_hashes(keys: Iterator[str], seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`least_of` the samples with some `keys`. Memory grows with `count`, not with the number of keys."""
    kept = np.zeros(0, np.dtype([("hash", "<u8"), ("number", "<i8")]))
    first = hashlib.blake2b(f"{seed}\0".encode(), digest_size=8)
    start = 0
    while True:
        new = np.fromiter((_hash(first, key) for key in itertools.islice(keys, CHUNK)), np.uint64)
        if not len(new):
            return kept["hash"].copy(), kept["number"].copy()
        found = np.empty(len(new), kept.dtype)
        found["hash"], found["number"] = new, np.arange(start, start + len(new))
        start += len(new)
        if len(kept) >= count:
            found = found[found["hash"] <= kept["hash"][count - 1]]
        kept = np.concatenate([kept, found])
        kept = kept[np.argsort(kept["hash"], kind="stable")]
        if len(kept) > count:
            kept = kept[: np.searchsorted(kept["hash"], kept["hash"][count - 1], side="right")]


def _hash(first: hashlib.blake2b, key: str) -> int:
    found = first.copy()
    found.update(key.encode(errors="surrogatepass"))
    return int.from_bytes(found.digest(), "little")
