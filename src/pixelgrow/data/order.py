"""The order of training samples: a pure function of the seed and the position in the stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pixelgrow.errors import UserError
from pixelgrow.rng import Key, seed_of


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
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}  # source: its epoch and the order in that

    def at(self, position: int) -> Draw:
        """The sample at a position, counted from 0."""
        for source, (share, whole) in enumerate(self._shares):
            before, after = position * share // whole, (position + 1) * share // whole
            if after > before:
                return Draw(source, self._item(source, before), before)
            position -= before
        raise AssertionError("the last source's share is one")

    def instead(self, draw: Draw, attempt: int) -> Draw:
        """Replacement number `attempt`, from 0, for a sample that cannot be decoded: any sample of its source."""
        key = seed_of(self.seed, "replacement", draw.source, draw.turn, attempt)
        return Draw(draw.source, key % self.counts[draw.source], draw.turn)

    def _item(self, source: int, turn: int) -> int:
        epoch, place = divmod(turn, self.counts[source])
        cached = self._shuffled.get(source)
        if cached is None or cached[0] != epoch:
            new = shuffled(self.counts[source], self.seed, "order", source, epoch)
            cached = self._shuffled[source] = (epoch, new)
        return int(cached[1][place])


def shuffled(count: int, *keys: Key) -> np.ndarray:
    """The numbers 0 to count - 1, (count,) int64, in an order that is a function of `keys`.

    Made of raw bits and a stable sort, which are the same in every version of numpy; `permutation` is not.
    """
    return np.argsort(np.random.PCG64(seed_of(*keys)).random_raw(count), kind="stable")
