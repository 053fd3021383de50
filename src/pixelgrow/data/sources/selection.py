"""Some of the numbers from 0 to N - 1, a bit each: which of millions of samples are large enough, or not held out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import SupportsIndex, overload

import numpy as np

CHUNK = 1 << 20  # samples whose columns are looked at together
_BLOCK = 512  # numbers between two that are counted


def chunks(count: int) -> Iterator[slice]:
    """The numbers from 0 to `count` - 1, part by part."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


class Selection:
    """Chosen numbers in ascending order, an array of int64 that is not in memory: N / 8 bytes, and N / 64 to count."""

    def __init__(self, total: int, masks: Iterable[np.ndarray]) -> None:
        """`masks`: for each of `chunks(total)`, which of its numbers are chosen, bool."""
        self.total = total
        self._bits = np.zeros(-(-total // _BLOCK) * (_BLOCK // 8), np.uint8)
        for part, mask in zip(chunks(total), masks, strict=True):
            packed = np.packbits(mask)
            self._bits[part.start // 8 : part.start // 8 + len(packed)] = packed
        blocks = np.bitwise_count(self._bits.reshape(-1, _BLOCK // 8)).sum(axis=1, dtype=np.int64)
        self._ends = np.cumsum(blocks)  # chosen numbers up to the end of each block

    @classmethod
    def but(cls, total: int, numbers: np.ndarray) -> Selection:
        """All numbers below `total` except `numbers`, which are sorted."""

        def mask(part: slice) -> np.ndarray:
            kept = np.ones(part.stop - part.start, np.bool_)
            first, last = np.searchsorted(numbers, (part.start, part.stop))
            kept[numbers[first:last] - part.start] = False
            return kept

        return cls(total, map(mask, chunks(total)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, at: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> np.ndarray: ...
    def __getitem__(self, at: SupportsIndex | slice) -> int | np.ndarray:
        """The chosen number at a place, or those of a slice without a step."""
        if isinstance(at, slice):
            assert at.step in (None, 1)
            return self._between(*at.indices(len(self))[:2])
        place = operator.index(at)
        if not -len(self) <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} chosen numbers")
        place %= len(self)
        return int(self._between(place, place + 1)[0])

    def _between(self, start: int, stop: int) -> np.ndarray:
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = (int(b) for b in np.searchsorted(self._ends, (start, stop - 1), side="right"))
        bits = self._bits[first * (_BLOCK // 8) : (last + 1) * (_BLOCK // 8)]
        before = int(self._ends[first - 1]) if first else 0
        return np.flatnonzero(np.unpackbits(bits))[start - before : stop - before] + first * _BLOCK

    def __iter__(self) -> Iterator[int]:
        for part in chunks(len(self)):
            yield from self[part].tolist()

    def __contains__(self, number: int) -> bool:
        return 0 <= number < self.total and bool(self._bits[number >> 3] & (128 >> (number & 7)))

    def rank(self, numbers: np.ndarray) -> np.ndarray:
        """How many chosen numbers are below each of `numbers` (n,), from 0 to `total`: (n,) int64."""
        found = np.full(len(numbers), len(self), np.int64)
        blocks = np.concatenate([[0], self._ends])
        rows = self._bits.reshape(-1, _BLOCK // 8)
        inside = np.flatnonzero(numbers < self.total)
        for part in np.array_split(inside, max(1, -(-len(inside) // 4096))):
            block, bit = np.divmod(numbers[part], _BLOCK)
            before = np.unpackbits(rows[block], axis=1) & (np.arange(_BLOCK) < bit[:, None])
            found[part] = blocks[block] + before.sum(axis=1)
        return found

    def mask(self, part: slice) -> np.ndarray:
        """Which of the numbers of a part (of `chunks(total)`) are chosen, bool."""
        size = part.stop - part.start
        return np.unpackbits(self._bits[part.start // 8 : -(-part.stop // 8)], count=size).view(np.bool_)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype)
