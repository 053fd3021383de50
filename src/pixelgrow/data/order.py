"""The order of training samples: a pure function of the seed and the position in the stream."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from pixelgrow.errors import UserError
from pixelgrow.rng import Key, seed_of

SORTED = 1 << 20  # numbers that are put in order by a sort
_ROUNDS = 6


@dataclass(frozen=True)
class Draw:
    """The sample at a position of the stream: number `item` of source number `source`, in a bucket.

    `turn`: how many samples of this source, and bucket, stand before it in the stream.
    """

    source: int
    item: int
    turn: int
    bucket: int = field(default=0, kw_only=True)


class Shares:
    """Positions that are dealt out in proportion to some shares, spread evenly."""

    def __init__(self, shares: Sequence[float]) -> None:
        # The k-th has its share of the positions that those before it leave. Fractions are exact at any position.
        exact = [Fraction(share) for share in shares]
        self._shares = [(share / sum(exact[k:])).as_integer_ratio() for k, share in enumerate(exact)]

    def at(self, position: int) -> tuple[int, int]:
        """Whose turn is at a position, counted from 0, and how many turns it had before."""
        for number, (share, whole) in enumerate(self._shares):
            before, after = position * share // whole, (position + 1) * share // whole
            if after > before:
                return number, before
            position -= before
        raise AssertionError("the last one's share is one")


class Order:
    """An endless stream of samples from several sources.

    `counts`: number of usable samples in each source. `weights`: share of the stream that each source has, spread
    evenly; None: in proportion to `counts`. Each source has a new order in each of its epochs. `sort`: see
    `Permutation`. Raises `UserError` for weights that are not one for each source, and above 0.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0, sort: bool | None = None
    ) -> None:
        shares = [float(c) for c in counts] if weights is None else [float(w) for w in weights]
        if len(shares) != len(counts):
            raise UserError(f"data: got {len(shares)} weights for {len(counts)} sources; give one each")
        if not all(0 < share < float("inf") for share in shares):
            raise UserError(f"data: got weights {shares}, expected numbers above 0; leave a source out to not use it")
        self.counts, self.seed, self.shares, self._sort = tuple(counts), seed, shares, sort
        self._turns = Shares(shares)
        self._orders: dict[int, tuple[int, Permutation]] = {}  # source: its epoch and the order in that

    def at(self, position: int) -> Draw:
        """The sample at a position, counted from 0."""
        source, turn = self.turn(position)
        return Draw(source, self._item(source, turn), turn)

    def turn(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many positions before it have the same one."""
        return self._turns.at(position)

    def instead(self, draw: Draw, attempt: int) -> Draw:
        """Replacement number `attempt`, from 0, for a sample that cannot be decoded: any sample of its source."""
        key = seed_of(self.seed, "replacement", draw.source, draw.turn, attempt)
        return Draw(draw.source, key % self.counts[draw.source], draw.turn)

    def needs(self, positions: Sequence[int]) -> dict[int, tuple[Sequence[int], Sequence[int]]]:
        """Of each source that is read shard by shard (`data.lanes`): the shards that some positions need, and those
        that the positions behind them will need."""
        return {}

    def _item(self, source: int, turn: int) -> int:
        epoch, place = divmod(turn, self.counts[source])
        cached = self._orders.get(source)
        if cached is None or cached[0] != epoch:
            new = Permutation(self.counts[source], self.seed, "order", source, epoch, sort=self._sort)
            cached = self._orders[source] = (epoch, new)
        return cached[1][place]


class BucketOrder:
    """An endless stream of samples in groups of `group` positions; the samples of a group are in one bucket.

    `counts[b][k]`: number of usable samples that source k has in bucket b, some in each bucket and of each source.
    `weights`: as of `Order`. A source is dealt out to its buckets by their numbers of samples, so each sample comes as
    often as in an `Order`. The groups of a bucket are spread evenly, and its samples have an `Order` of their own that
    goes on from group to group: an epoch of it may end within a group, and nothing is left over.
    """

    def __init__(
        self, counts: Sequence[Sequence[int]], weights: Sequence[float] | None = None, seed: int = 0, group: int = 1
    ) -> None:
        totals = [sum(column) for column in zip(*counts, strict=True)]
        shares = [Fraction(share) for share in Order(totals, weights, seed).shares]
        sort = sum(totals) <= SORTED  # or none, for together they would take as much memory as one order of all
        self._group = group
        self._sources: list[list[int]] = []  # of each bucket
        self._orders: list[Order] = []
        of_buckets: list[float] = []
        for bucket, row in enumerate(counts):
            mine = [source for source, count in enumerate(row) if count]
            each = [float(shares[source] * row[source] / totals[source]) for source in mine]
            own = seed_of(seed, "bucket", bucket) if bucket else seed
            self._sources.append(mine)
            self._orders.append(Order([row[source] for source in mine], each, own, sort))
            of_buckets.append(sum(each))
        self._turns = Shares(of_buckets)

    def at(self, position: int) -> Draw:
        """The sample at a position, counted from 0."""
        number, place = divmod(position, self._group)
        bucket, turn = self._turns.at(number)
        draw = self._orders[bucket].at(turn * self._group + place)
        return Draw(self._sources[bucket][draw.source], draw.item, draw.turn, bucket=bucket)

    def instead(self, draw: Draw, attempt: int) -> Draw:
        """Replacement number `attempt`, from 0, for a sample that cannot be decoded: any of its source and bucket."""
        sources = self._sources[draw.bucket]
        found = self._orders[draw.bucket].instead(replace(draw, source=sources.index(draw.source)), attempt)
        return replace(draw, item=found.item)

    def needs(self, positions: Sequence[int]) -> dict[int, tuple[Sequence[int], Sequence[int]]]:
        """As of an `Order`: nothing, for no source in buckets is read shard by shard."""
        return {}


class Permutation:
    """The numbers 0 to `count` - 1 in an order that is a function of `keys`, the same in every version of numpy.

    Up to a million are sorted by raw random bits (`numpy.random.permutation` may change). For more, or with `sort`
    False, a Feistel network computes each from its place: a place is two digits (l, r) in base ceil(sqrt(count)), each
    round makes (r, l + F(r)) of them, and what lands beyond `count` goes through again. F is a table of random digits
    for each round, so an order of N numbers takes O(sqrt(N)) memory and time to begin (Luby and Rackoff, SIAM J.
    Comput. 17(2), 1988; in other bases and with the walk back into range: Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, count: int, *keys: Key, sort: bool | None = None) -> None:
        self._count = count
        sort = count <= SORTED if sort is None else sort
        bits = np.random.PCG64(seed_of(*keys))
        self._sorted = np.argsort(bits.random_raw(count), kind="stable") if sort else None
        self._base = 0 if sort else math.isqrt(count - 1) + 1
        drawn = bits.random_raw(_ROUNDS * self._base) % np.uint64(self._base) if self._base else np.zeros(0)
        self._tables = [table.tolist() for table in np.split(drawn, _ROUNDS)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        if self._sorted is not None:
            return int(self._sorted[place])
        if not 0 <= place < self._count:
            raise IndexError(f"place {place} of {self._count}")
        base, number = self._base, place
        while True:
            left, right = divmod(number, base)
            for table in self._tables:
                left, right = right, (left + table[right]) % base
            number = left * base + right
            if number < self._count:
                return number

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self._count))
