"""Buckets: images grouped by shape, at one area, so that little of each is cropped. A batch has one of the shapes.

As SDXL trains (arXiv 2307.01952, section 2.3). Ours: shapes are those of the core's grid, so that a grown model's are
its core's, scaled; an image of which more than `MOST` would be cropped is left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from pixelgrow.data.sources.base import Source, in_buckets, sides_of
from pixelgrow.data.sources.selection import Selection, chunks

LONGEST = 4  # the longer side of the longest shape over its shorter side
STEPS = 6  # shapes for each doubling of that ratio, where the grid is fine enough
MOST = 0.2  # share of an image that may be cropped
SMALL, ODD = -1, -2  # of images without a bucket: it would enlarge them, or crop more than `MOST` of them
Size = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """The sizes (h, w) of a stage's images: `size`, and with a `stride` those of buckets.

    size: of images of sources without buckets, all of which are cropped to it; with a stride a square. stride: pixels
    per token of the core; sides are multiples of it.
    """

    size: Size
    stride: int | None = None

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Every size, the widest first. Of each shape the grid has at most as many tokens as the square's, and at least
        as many as that without one of its rows."""
        if self.stride is None:
            return (self.size,)
        side = self.size[0] // self.stride
        grids = [
            (h, w)
            for h in range(side, LONGEST * side + 1)
            for w in range(-(-side * (side - 1) // h), side * side // h + 1)
            if w and w <= h <= LONGEST * w
        ]
        tall = set[Size]()
        for step in range(int(STEPS * math.log2(LONGEST)) + 1):
            aspect = 2 ** (step / STEPS)
            off = {(h, w): round(max(h / w / aspect, aspect * w / h), 9) for h, w in grids}
            tall.add(min(grids, key=lambda grid: (off[grid], -grid[0] * grid[1])))
        both = tall | {(w, h) for h, w in tall}
        return tuple((h * self.stride, w * self.stride) for h, w in sorted(both, key=lambda grid: grid[0] / grid[1]))

    def times(self, factor: int) -> Shapes:
        """The same shapes with sides `factor` times as long."""
        h, w = self.size
        return Shapes((factor * h, factor * w), self.stride and factor * self.stride)

    def nearest(self, sides: np.ndarray, buckets: bool) -> np.ndarray:
        """The number among `sizes` of the one with the nearest shape, (n,) int8, for originals of `sides` (n, 2).

        buckets: whether the images are in buckets; else it is that of `size`.
        """
        if not buckets or self.stride is None:
            return np.full(len(sides), self.sizes.index(self.size), np.int8)
        # Divisions and roots are the same everywhere, logarithms are not.
        aspects = [h / w for h, w in self.sizes]
        middles = np.sqrt([a * b for a, b in pairwise(aspects)])
        return np.searchsorted(middles, sides[:, 0] / sides[:, 1]).astype(np.int8)

    def numbers(self, sides: np.ndarray, buckets: bool) -> np.ndarray:
        """The bucket of each image as a number, `nearest` where it is in one, else SMALL or ODD."""
        found = self.nearest(sides, buckets)
        targets = np.array(self.sizes, np.int32)[found]
        odd = buckets and self.stride is not None and cropped(sides, targets) > MOST
        small = (sides[:, 0] < targets[:, 0]) | (sides[:, 1] < targets[:, 1])
        return np.where(odd, np.int8(ODD), np.where(small, np.int8(SMALL), found))


def square(side: int) -> Shapes:
    """One size for all images."""
    return Shapes((side, side))


def cropped(sides: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The share of each image that a crop to its size cuts off, (n,); sides, sizes: (n, 2) of (h, w)."""
    ratio = (sides[:, 0] * sizes[:, 1].astype(np.float64)) / (sides[:, 1] * sizes[:, 0].astype(np.float64))
    return 1 - np.minimum(ratio, 1 / ratio)


def numbers_of(source: Source, shapes: Shapes) -> Iterator[np.ndarray]:
    """`Shapes.numbers` of all samples of a source, chunk by chunk."""
    buckets = in_buckets(source)
    return (shapes.numbers(sides_of(source, part), buckets) for part in chunks(len(source)))


def size_of(source: Source, i: int, shapes: Shapes) -> Size:
    """The size with the nearest shape to a sample's image; `shapes.size` of a source without buckets."""
    return shapes.sizes[int(shapes.nearest(np.array([source.size(i)]), in_buckets(source))[0])]


def usable(source: Source, shapes: Shapes) -> Selection:
    """The samples of a source that are in a bucket: of one without buckets, those that are large enough."""
    return Selection(len(source), (numbers >= 0 for numbers in numbers_of(source, shapes)))


@dataclass(frozen=True)
class Bucket:
    """Samples whose images have one `size`: `items[k]` are numbers of samples of source k."""

    size: Size
    items: tuple[Selection, ...]


def filled(sources: Sequence[Source], shapes: Shapes) -> list[Bucket]:
    """The buckets that some sample of the sources is in, the widest first."""
    numbers = [np.concatenate(list(numbers_of(source, shapes))) for source in sources]
    found = []
    for number, size in enumerate(shapes.sizes):
        items = tuple(Selection(len(some), (some[p] == number for p in chunks(len(some)))) for some in numbers)
        if any(map(len, items)):
            found.append(Bucket(size, items))
    return found
