"""What is in a source: counts, resolutions, captions, bad files, a contact sheet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixelgrow.data.account import Account, account_of
from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import (
    BadFile,
    PassedOver,
    Source,
    Subset,
    bad_of,
    files_of,
    large_enough,
    sizes_of,
    wordings_of,
)
from pixelgrow.writing import writing

SHEET = (4, 8)  # rows, columns of the contact sheet
TILE = 128  # pixels
STAGES = ((64, 64), (128, 128), (256, 256), (512, 512))  # sizes (h, w) of stages, where no recipe says which
_LABEL = 30  # pixels below a tile
_MAX_CAPTIONS = 20_000


@dataclass(frozen=True)
class Lengths:
    """Spread of a count."""

    least: int
    median: int
    p95: int
    most: int


@dataclass(frozen=True)
class Reason:
    """What is wrong with bad files, of which `example` is the first, and how many samples are lost with them."""

    text: str
    samples: int
    example: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_source` found. Sizes are (h, w) in pixels."""

    name: str
    kind: str  # how its captions come
    files: int  # distinct images, those that are bad or lost included
    samples: int  # usable (image, caption) pairs, without those that could not be decoded
    guess: str  # what was assumed about the source, if anything
    passed: tuple[PassedOver, ...]  # files that are no samples and no faults
    notes: tuple[tuple[str, int], ...]  # what else is true of some of its files, and of how many
    decoded: int  # samples that were decoded to look for damage
    bad: tuple[BadFile, ...]  # found by the index and by decoding
    sides: tuple[tuple[int, int], ...]  # (from this smaller side on, up to twice that: number of samples)
    stages: tuple[tuple[tuple[int, int], Account], ...]  # (a stage's size, what it would see)
    words: Lengths  # of the captions looked at
    characters: Lengths
    captions: int  # how many captions were looked at
    distinct: int  # distinct ones among them
    classes: tuple[tuple[str, int], ...]  # (name, number of samples), by label
    sheet: Path | None
    shown: tuple[str, str]  # the first and last image on the sheet

    def reasons(self) -> list[Reason]:
        """Why files are bad, the most frequent reason first."""
        first = {bad.reason: bad.key for bad in reversed(self.bad)}
        lost = Counter[str]()
        for bad in self.bad:
            lost[bad.reason] += bad.samples
        return [Reason(why, n, first[why]) for why, n in lost.most_common()]


def inspect_source(
    source: Source,
    stages: Sequence[tuple[int, int]] = STAGES,
    decode: int | None = 1000,
    sheet: str | os.PathLike[str] | None = None,
    train: Subset | None = None,
) -> Inspection:
    """Look into an open source.

    `stages`: sizes (h, w) to count the usable samples for. `decode`: how many samples, evenly spaced, to decode in
    search of damage that headers do not show; None is all. `sheet`: where to write a contact sheet (PNG). `train`: the
    part of the source that stages would train on; None is all.
    """
    bad = {file.key: file for file in bad_of(source)}
    decoded = _spread(len(source), len(source) if decode is None else decode)
    broken: list[int] = []
    for item in decoded:
        try:
            source.image(item, (TILE, TILE), (0.5, 0.5))
        except BadImage as error:
            broken.append(item)
            bad.setdefault(source.key(item), BadFile(source.key(item), error.reason))
    classes: tuple[str, ...] = getattr(source, "classes", ())
    texts = captions_in(source)
    labels = Counter(texts) if classes else Counter[str]()
    return Inspection(
        name=source.name,
        kind=getattr(source, "kind", type(source).__name__.lower()),
        files=files_of(source),
        samples=len(source) - len(broken),
        guess=getattr(source, "guess", ""),
        passed=getattr(source, "passed", ()),
        notes=getattr(source, "notes", ()),
        decoded=len(decoded),
        bad=tuple(bad.values()),
        sides=_histogram(sizes_of(source).min(axis=1)),
        stages=tuple((size, _account(source, train, size, broken)) for size in stages),
        words=_lengths([len(text.split()) for text in texts]),
        characters=_lengths([len(text) for text in texts]),
        captions=len(texts),
        distinct=len(set(texts)),
        classes=tuple((name, labels[str(label)]) for label, name in enumerate(classes)),
        sheet=None if sheet is None else contact_sheet(source, sheet),
        shown=(source.key(0), source.key(_spread(len(source), SHEET[0] * SHEET[1])[-1])),
    )


def _account(source: Source, train: Subset | None, size: tuple[int, int], broken: Sequence[int]) -> Account:
    """What a stage of `size` (h, w) would see, without the samples whose numbers are `broken`."""
    seen = large_enough(source, size)
    if train is not None:
        seen = np.intersect1d(seen, train.indices)
    return account_of([train or source], size).but("bad", int(np.isin(broken, seen).sum()))


def captions_in(source: Source) -> list[str]:
    """Captions of a source, of at most 20,000 samples, evenly spaced; of a source of classes all labels."""
    looked_at = _spread(len(source), len(source) if getattr(source, "classes", ()) else _MAX_CAPTIONS)
    return [wording.text for item in looked_at for wording in wordings_of(source, item)]


def contact_sheet(source: Source, path: str | os.PathLike[str]) -> Path:
    """Write a PNG of samples spread over the source, each with the start of its caption; whole or not at all.

    Raises UserError if `path` cannot be written.
    """
    rows, columns = SHEET
    page = Image.new("RGB", (columns * TILE, rows * (TILE + _LABEL)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    classes: tuple[str, ...] = getattr(source, "classes", ())
    for place, item in enumerate(_spread(len(source), rows * columns)):
        x, y = place % columns * TILE, place // columns * (TILE + _LABEL)
        text = source.text(item)
        text = classes[int(text)] if classes else text
        try:
            page.paste(Image.fromarray(source.image(item, (TILE, TILE), (0.5, 0.5))), (x, y))
        except BadImage as error:
            text = f"BAD: {error.reason}"
        text = text.encode("latin-1", "replace").decode("latin-1")  # all that the built-in font is sure to draw
        for line in range(2):
            draw.text((x + 2, y + TILE + 1 + 13 * line), text[20 * line : 20 * (line + 1)], "black", font)
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        page.save(part, "PNG")
        part.replace(target)
    return target


def _spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, evenly spaced."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def _histogram(sides: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(power of two, how many of `sides` lie from it to below its double), without the empty ends."""
    octaves = np.bincount(np.frexp(np.maximum(sides, 1).astype(np.float64))[1] - 1)
    return tuple((1 << octave, int(count)) for octave, count in enumerate(octaves) if octave >= octaves.nonzero()[0][0])


def _lengths(values: Sequence[int]) -> Lengths:
    least, median, p95, most = np.percentile(values, [0, 50, 95, 100], method="nearest")
    return Lengths(int(least), int(median), int(p95), int(most))
