"""How many images a stage sees of how many its data hold, and where the others are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pixelgrow.data.buckets import ODD, Shapes, cropped, numbers_of, usable
from pixelgrow.data.sources.base import (
    Source,
    Subset,
    bad_of,
    clear_among,
    ground_of,
    in_buckets,
    passed_images,
    sides_of,
)
from pixelgrow.data.sources.selection import chunks


@dataclass(frozen=True)
class Account:
    """`total` images, or other `things`, were found; `others`: why some are not seen, and how many.

    `grounds`: how many of those seen have transparent parts, by the colour that these are shown in. `buckets`: of
    images in buckets, by size: how many, and the mean share of them that is cropped.
    """

    total: int
    others: Mapping[str, int] = field(default_factory=dict)
    things: str = "images"
    grounds: Mapping[str, int] = field(default_factory=dict)
    buckets: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Account:
        """What `stored` was made of."""
        buckets = {size: (count, lost) for size, (count, lost) in values.get("buckets", {}).items()}
        return cls(values["total"], values["others"], values["things"], values.get("grounds", {}), buckets)

    @property
    def seen(self) -> int:
        return self.total - sum(self.others.values())

    @property
    def cropped(self) -> float:
        """The mean share that is cropped, of all images in buckets."""
        count = sum(count for count, _ in self.buckets.values())
        return sum(count * lost for count, lost in self.buckets.values()) / max(1, count)

    def line(self) -> str:
        """In words: sees 10 of 60 images: 40 too small, 10 held out; transparent parts of 7 are white; 3 shapes, 2.5%
        cropped."""
        parts = ", ".join(f"{count:,} {why}" for why, count in self.others.items() if count)
        grounds = "".join(
            f"; transparent parts of {count:,} are {ground}" for ground, count in self.grounds.items() if count
        )
        shapes = f"; {len(self.buckets)} shapes, {100 * self.cropped:.1f}% cropped" if self.buckets else ""
        return f"sees {self.seen:,} of {self.total:,} {self.things}{parts and ': '}{parts}{grounds}{shapes}"

    def but(self, why: str, count: int) -> Account:
        """The same account with `count` more that are not seen."""
        return replace(self, others={**self.others, why: self.others.get(why, 0) + count})

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        found = {"things": self.things, "seen": self.seen, "total": self.total, "others": dict(self.others)}
        found |= {"grounds": dict(self.grounds)} if self.grounds else {}
        return found | ({"buckets": {k: list(v) for k, v in self.buckets.items()}} if self.buckets else {})


def account_of(sources: Sequence[Source], shapes: Shapes) -> Account:
    """What a stage of images of some shapes sees of the sources that it trains on, parts of them held out or not."""
    others, grounds, total = Counter[str](), Counter[str](), 0
    grouped = shapes.stride is not None and any(map(in_buckets, sources))
    counts, lost = np.zeros((2, len(shapes.sizes)))
    for source in sources:
        whole = source.parent if isinstance(source, Subset) else source
        bad, passed = sum(bad.samples for bad in bad_of(whole)), passed_images(whole)
        total += len(whole) + bad + passed
        seen = usable(source, shapes)
        grounds[ground_of(source)] += clear_among(source, seen)
        others["too small"] += len(source) - len(seen)
        if grouped:
            for part, numbers in zip(chunks(len(source)), numbers_of(source, shapes), strict=True):
                others["too small"] -= int((numbers == ODD).sum())
                others["of no bucket's shape"] += int((numbers == ODD).sum())
                inside = numbers[numbers >= 0]
                crops = cropped(sides_of(source, part)[numbers >= 0], np.array(shapes.sizes)[inside])
                counts += np.bincount(inside, minlength=len(counts))
                lost += np.bincount(inside, crops, len(counts))
        others["held out"] += len(whole) - len(source)
        others["passed over"] += passed
        others["bad"] += bad
    buckets = {
        f"{h}x{w}": (int(count), round(float(crops / count), 4))
        for (h, w), count, crops in zip(shapes.sizes, counts, lost, strict=True)
        if grouped and count
    }
    return Account(total, others, grounds=+grounds, buckets=buckets)
