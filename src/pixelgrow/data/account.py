"""How many images a stage sees of how many its data hold, and where the others are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pixelgrow.data.sources.base import Source, Subset, bad_of, clear_among, ground_of, large_enough, passed_images


@dataclass(frozen=True)
class Account:
    """`total` images, or other `things`, were found; `others`: why some are not seen, and how many.

    `grounds`: how many of those seen have transparent parts, by the colour that these are shown in.
    """

    total: int
    others: Mapping[str, int] = field(default_factory=dict)
    things: str = "images"
    grounds: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Account:
        """What `stored` was made of."""
        return cls(values["total"], values["others"], values["things"], values.get("grounds", {}))

    @property
    def seen(self) -> int:
        return self.total - sum(self.others.values())

    def line(self) -> str:
        """In words: sees 10 of 60 images: 40 too small, 10 held out; transparent parts of 7 are white."""
        parts = ", ".join(f"{count:,} {why}" for why, count in self.others.items() if count)
        grounds = "".join(
            f"; transparent parts of {count:,} are {ground}" for ground, count in self.grounds.items() if count
        )
        return f"sees {self.seen:,} of {self.total:,} {self.things}{parts and ': '}{parts}{grounds}"

    def but(self, why: str, count: int) -> Account:
        """The same account with `count` more that are not seen."""
        return replace(self, others={**self.others, why: self.others.get(why, 0) + count})

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        found = {"things": self.things, "seen": self.seen, "total": self.total, "others": dict(self.others)}
        return found | ({"grounds": dict(self.grounds)} if self.grounds else {})


def account_of(sources: Sequence[Source], size: tuple[int, int]) -> Account:
    """What a stage of `size` (h, w) in pixels sees of the sources that it trains on, parts of them held out or not."""
    others, grounds, total = Counter[str](), Counter[str](), 0
    for source in sources:
        whole = source.parent if isinstance(source, Subset) else source
        bad, passed = sum(bad.samples for bad in bad_of(whole)), passed_images(whole)
        total += len(whole) + bad + passed
        seen = large_enough(source, size)
        grounds[ground_of(source)] += clear_among(source, seen)
        others["too small"] += len(source) - len(seen)
        others["held out"] += len(whole) - len(source)
        others["passed over"] += passed
        others["bad"] += bad
    return Account(total, others, grounds=+grounds)
