"""The order of training samples: a pure function of the seed and the position in the stream."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pixelgrow.errors import UserError
from pixelgrow.rng import Key, seed_of

SORTED = 1 << 20  # numbers that are put in order by a sort
_ROUNDS = 6


@dataclass(frozen=True)
class Draw:
    """The sample at a position of the stream: number `item` of source number `source`.

    `turn`: how many samples of this source stand before it in the stream.
    """

    source: int
    item: int
    turn: int


class Order:
    """An endless stream of samples from several sources.

    `counts`: number of usable samples in each source. `weights`: share of the stream that each source has, spread
    evenly; None: in proportion to `counts`. Each source has a new order in each of its epochs.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        shares = [float(c) for c in counts] if weights is None else [float(w) for w in weights]
        if len(shares) != len(counts):
            raise UserError(f"data: got {len(shares)} weights for {len(counts)} sources; give one each")
        if not all(0 < share < float("inf") for share in shares):
            raise UserError(f"data: got weights {shares}, expected numbers above 0; leave a source out to not use it")
        self.counts, self.seed = tuple(counts), seed
        # Source k has its share of the positions that sources 0 to k-1 leave. Fractions are exact at any position.
        exact = [Fraction(share) for share in shares]
        self._shares = [(share / sum(exact[k:])).as_integer_ratio() for k, share in enumerate(exact)]
        self._orders: dict[int, tuple[int, Permutation]] = {}  # source: its epoch and the order in that

    def at(self, position: int) -> Draw:
        """The sample at a position, counted from 0."""
        source, turn = self.turn(position)
        return Draw(source, self._item(source, turn), turn)

    def turn(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many positions before it have the same one."""
        for source, (share, whole) in enumerate(self._shares):
            before, after = position * share // whole, (position + 1) * share // whole
            if after > before:
                return source, before
            position -= before
        raise AssertionError("the last source's share is one")

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
            new = Permutation(self.counts[source], self.seed, "order", source, epoch)
            cached = self._orders[source] = (epoch, new)
        return cached[1][place]


class Permutation:
    """The numbers 0 to `count` - 1 in an order that is a function of `keys`, the same in every version of numpy.

    Up to a million are sorted by raw random bits (`numpy.random.permutation` may change). For more, a Feistel network
    computes each from its place: a place is two digits (l, r) in base ceil(sqrt(count)), each round makes (r, l + F(r))
    of them, and what lands beyond `count` goes through again. F is a table of random digits for each round, so an order
    of N numbers takes O(sqrt(N)) memory and time to begin (Luby and Rackoff, SIAM J. Comput. 17(2), 1988; in other
    bases and with the walk back into range: Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, count: int, *keys: Key) -> None:
        self._count = count
        bits = np.random.PCG64(seed_of(*keys))
        self._sorted = np.argsort(bits.random_raw(count), kind="stable") if count <= SORTED else None
        self._base = math.isqrt(count - 1) + 1 if count > SORTED else 0
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
