"""The order of samples of sources that are read shard by shard: in lanes, each shuffled within a few shards.

A step's positions are cut into equal parts, the lanes. In each epoch a source's shards are permuted and laid end to
end, and each lane takes an equal part of the samples: so a lane needs few shards at a time, and each sample comes once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pixelgrow.data.order import Draw, Order, Permutation
from pixelgrow.data.sources.base import Source
from pixelgrow.data.sources.selection import Selection
from pixelgrow.errors import UserError
from pixelgrow.rng import Key, seed_of

_NEAR = 16  # replacements that are looked for in the shards that are at hand
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Window:
    """The samples of a few shards, or parts of shards, that `lane` shuffles.

    `shards` (k,): their numbers. `ends` (k,): how many of its samples are in these up to each of them. `items` (k,):
    the first sample of each. `first`: the lane's turn at which it begins.
    """

    lane: int
    first: int
    shards: tuple[int, ...]
    ends: np.ndarray
    items: np.ndarray
    keys: tuple[Key, ...]

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def end(self) -> int:
        """The lane's turn behind it."""
        return self.first + len(self)

    @cached_property
    def _order(self) -> Permutation:
        return Permutation(len(self), *self.keys)

    def at(self, turn: int) -> int:
        """The sample of a turn of the lane."""
        return self.item(self._order[turn - self.first])

    def item(self, place: int) -> int:
        """The sample at a place, in the shards' own order."""
        part = int(np.searchsorted(self.ends, place, side="right"))
        return int(self.items[part]) + place - (int(self.ends[part - 1]) if part else 0)


class LaneOfShards:
    """The order of one source in `count` lanes, which shuffle `window` shards at a time.

    `cuts` (S + 1,): number of its samples before each shard, and of all.
    """

    def __init__(self, cuts: np.ndarray, count: int, window: int, *keys: Key) -> None:
        self._cuts, self._sizes = cuts, np.diff(cuts)
        self._count, self._window, self._keys = count, window, keys
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._recent: dict[int, list[Window]] = {}  # of each lane

    def window(self, lane: int, turn: int) -> Window:
        """The window in which a lane is at a turn, counted from 0 and through all epochs."""
        recent = self._recent.get(lane, [])
        for known in recent:
            if known.first <= turn < known.end:
                return known
        made = self._made(lane, turn)
        self._recent[lane] = [made, *recent][:2]
        return made

    def _made(self, lane: int, turn: int) -> Window:
        total = int(self._cuts[-1])
        start, stop = lane * total // self._count, (lane + 1) * total // self._count  # of the lane, in an epoch
        epoch, place = divmod(turn, stop - start)
        shards, ends = self._epoch(epoch)
        first, at, last = np.searchsorted(ends, (start, start + place, stop - 1), side="right").tolist()
        low = first + (at - first) // self._window * self._window
        high = min(low + self._window, last + 1)
        some = shards[low:high]
        starts = ends[low:high] - self._sizes[some]
        begin = max(start, int(starts[0]))
        mine = np.minimum(ends[low:high], stop) - begin
        return Window(
            lane,
            epoch * (stop - start) + begin - start,
            tuple(some[self._sizes[some] > 0].tolist()),
            mine,
            self._cuts[some] + np.maximum(begin - starts, 0),
            (*self._keys, "window", epoch, lane, low - first),
        )

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and how many samples are in them up to each."""
        if epoch not in self._epochs:
            shards = np.fromiter(Permutation(len(self._sizes), *self._keys, "shards", epoch), np.int64)
            self._epochs = dict([*self._epochs.items(), (epoch, (shards, np.cumsum(self._sizes[shards])))][-2:])
        return self._epochs[epoch]


@dataclass(frozen=True)
class LaneDraw(Draw):
    """A draw of a source of shards."""

    window: Window


class LaneOrder(Order):
    """An endless stream of samples, some of whose sources are read in lanes.

    `step`: positions of a step; lane l of `count` has the l-th part of each. `cuts`: of each source that has lanes, its
    usable samples before each shard, and all; None for others, whose samples come as in an `Order`. `windows`: of each
    source, how many shards a lane shuffles at a time.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        step: int,
        count: int,
        cuts: Sequence[np.ndarray | None],
        windows: Sequence[int],
    ) -> None:
        super().__init__(counts, weights, seed)
        self._lanes, self._part = count, step // count
        self._shards = [
            None if ends is None else LaneOfShards(ends, count, window, seed, "lanes", source)
            for source, (ends, window) in enumerate(zip(cuts, windows, strict=True))
        ]

    def at(self, position: int) -> Draw:
        lanes, place = divmod(position, self._part)
        step, lane = divmod(lanes, self._lanes)
        source, mine = self.turn(step * self._part + place)
        turn = mine * self._lanes + lane
        shards = self._shards[source]
        if shards is None:
            return Draw(source, self._item(source, turn), turn)
        window = shards.window(lane, mine)
        return LaneDraw(source, window.at(mine), turn, window)

    def instead(self, draw: Draw, attempt: int) -> Draw:
        """Replacement number `attempt`: of the shards that are at hand, then any sample of its source."""
        if not isinstance(draw, LaneDraw) or attempt >= _NEAR:
            return super().instead(draw, attempt)
        key = seed_of(self.seed, "replacement", draw.source, draw.turn, attempt)
        return LaneDraw(draw.source, draw.window.item(key % len(draw.window)), draw.turn, draw.window)

    def needs(self, positions: Sequence[int]) -> dict[int, tuple[Sequence[int], Sequence[int]]]:
        windows: dict[int, dict[Window, None]] = {}
        for draw in map(self.at, positions):
            if isinstance(draw, LaneDraw):
                windows.setdefault(draw.source, {})[draw.window] = None
        needs: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        for source, mine in windows.items():
            shards = self._shards[source]
            assert shards is not None
            now = dict.fromkeys(shard for window in mine for shard in window.shards)
            nexts = [shards.window(window.lane, window.end) for window in mine]
            after = dict.fromkeys(shard for window in nexts for shard in window.shards)
            needs[source] = list(now), [shard for shard in after if shard not in now]
        return needs


def order_of(
    sources: Sequence[Source],
    usable: Sequence[Selection],
    weights: Sequence[float] | None,
    seed: int,
    step: int | None,
) -> Order:
    """The order of the `usable` samples of sources: in lanes, if some have any and a step has `step` positions.

    Raises `UserError` for lanes of different numbers, and for fewer images than lanes.
    """
    counts = [len(items) for items in usable]
    lanes = [getattr(source, "lanes", None) if step else None for source in sources]
    numbers = {some.count: source for some, source in zip(lanes, sources, strict=True) if some is not None}
    if step is None or not numbers:
        return Order(counts, weights, seed)
    if len(numbers) > 1:
        said = " and ".join(f"{source.name} {number}" for number, source in numbers.items())
        raise UserError(f"data: the sources have different numbers of lanes ({said}): give all the same (lanes:)")
    ((wanted, source),) = numbers.items()
    count = math.gcd(wanted, step)
    if count != wanted:
        logger.warning("%s: %d lanes do not divide a batch of %d images: %d are used", source.name, wanted, step, count)
    cuts = [
        None if some is None else items.rank(source.cuts)  # type: ignore[attr-defined]
        for some, source, items in zip(lanes, sources, usable, strict=True)
    ]
    for one, ends in zip(sources, cuts, strict=True):
        if ends is not None and ends[-1] < count:
            raise UserError(f"{one.name}: {ends[-1]} images for {count} lanes: write lanes: 1")
    return LaneOrder(counts, weights, seed, step, count, cuts, [some.window if some else 1 for some in lanes])
