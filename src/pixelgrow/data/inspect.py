"""Look into a source: counts, sizes, captions, bad files, a contact sheet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixelgrow.data.account import Account, account_of
from pixelgrow.data.buckets import Shapes, cropped, size_of, usable
from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import (
    BadFile,
    PassedOver,
    Source,
    Subset,
    bad_of,
    clear_among,
    files_of,
    ground_of,
    in_buckets,
    sizes_of,
    wordings_of,
)
from pixelgrow.writing import writing

SHEET = (4, 8)  # rows, columns of the contact sheet
TILE = 128  # pixels of an image on it
# Of the stages where no recipe says which; their buckets are those of a core of 16 x 16 tokens.
STAGES = tuple(Shapes((side, side), side // 16) for side in (64, 128, 256, 512))
_TILES = Shapes((TILE // 2, TILE // 2), TILE // 32)  # of buckets on it: the longest just fit
_LABEL = 30  # pixels below a tile, for its caption
_MAX_CAPTIONS = 20_000  # samples whose captions are read


@dataclass(frozen=True)
class Lengths:
    """Quantiles of a count over captions."""

    least: int
    median: int
    p95: int
    most: int


@dataclass(frozen=True)
class Reason:
    """Why files are bad (`text`), how many samples are lost with them, and the first of these files."""

    text: str
    samples: int
    example: str


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_source`. Sizes are (h, w) in pixels."""

    name: str
    kind: str  # the form of its captions
    files: int  # distinct images, with those that are bad or lost
    samples: int  # usable (image, caption) pairs, without those that could not be decoded
    guess: str  # what was assumed about the source; "" for nothing
    passed: tuple[PassedOver, ...]  # files that are neither samples nor bad
    notes: tuple[tuple[str, int], ...]  # other facts about files, and the number of files of each
    decoded: int  # samples that were decoded to find damage
    bad: tuple[BadFile, ...]  # found in headers and by decoding
    sides: tuple[tuple[int, int], ...]  # (s, number of samples whose smaller side is s to 2 s - 1)
    stages: tuple[tuple[tuple[int, int], Account], ...]  # (size of a stage, what it would see)
    squared: float  # the mean share of an image that a crop to a square cuts off
    words: Lengths  # in a caption
    characters: Lengths
    captions: int  # number of captions read
    distinct: int  # number of distinct ones among them
    classes: tuple[tuple[str, int], ...]  # (name, number of samples), in order of labels
    sheet: Path | None  # the contact sheet
    shown: tuple[str, str]  # the first and last image on the sheet

    def reasons(self) -> list[Reason]:
        """Why files are bad, the reason with most samples first."""
        first = {bad.reason: bad.key for bad in reversed(self.bad)}
        lost = Counter[str]()
        for bad in self.bad:
            lost[bad.reason] += bad.samples
        return [Reason(why, n, first[why]) for why, n in lost.most_common()]


def inspect_source(
    source: Source,
    stages: Sequence[Shapes] = STAGES,
    decode: int | None = 1000,
    sheet: str | os.PathLike[str] | None = None,
    train: Subset | None = None,
) -> Inspection:
    """Look into an open source.

    `stages`: shapes of the images of stages, whose samples are counted. `decode`: how many samples, evenly spaced, are
    decoded to find damage that headers do not show; None: all. `sheet`: where to write a contact sheet (PNG). `train`:
    the part of the source that stages would train on; None: all.
    """
    bad = {file.key: file for file in bad_of(source)}
    decoded = spread(len(source), len(source) if decode is None else decode)
    broken: list[int] = []
    for item in decoded:
        try:
            source.image(item, (TILE, TILE), (0.5, 0.5))
        except BadImage as error:
            broken.append(item)
            bad.setdefault(source.key(item), BadFile(source.key(item), error.reason))
    classes: tuple[str, ...] = getattr(source, "classes", ())
    texts = captions_in(source)
    clear, sizes = clear_among(source), sizes_of(source)
    labels = Counter(texts) if classes else Counter[str]()
    return Inspection(
        name=source.name,
        kind=getattr(source, "kind", type(source).__name__.lower()),
        files=files_of(source),
        samples=len(source) - len(broken),
        guess=getattr(source, "guess", ""),
        passed=getattr(source, "passed", ()),
        notes=(
            *getattr(source, "notes", ()),
            *([(f"images with transparency, shown on {ground_of(source)}", clear)] if clear else []),
        ),
        decoded=len(decoded),
        bad=tuple(bad.values()),
        sides=_histogram(sizes.min(axis=1)),
        stages=tuple((shapes.size, _account(source, train, shapes, broken)) for shapes in stages),
        squared=float(cropped(sizes, np.ones((1, 2))).mean()),
        words=_lengths([len(text.split()) for text in texts]),
        characters=_lengths([len(text) for text in texts]),
        captions=len(texts),
        distinct=len(set(texts)),
        classes=tuple((name, labels[str(label)]) for label, name in enumerate(classes)),
        sheet=None if sheet is None else contact_sheet(source, sheet),
        shown=(source.key(0), source.key(spread(len(source), SHEET[0] * SHEET[1])[-1])),
    )


def _account(source: Source, train: Subset | None, shapes: Shapes, broken: Sequence[int]) -> Account:
    """What a stage of images of some shapes would see; `broken`: numbers of samples that cannot be decoded."""
    seen = np.asarray(usable(source, shapes))
    if train is not None:
        seen = np.intersect1d(seen, train.indices)
    return account_of([train or source], shapes).but("bad", int(np.isin(broken, seen).sum()))


def captions_in(source: Source) -> list[str]:
    """Captions of at most 20,000 samples of a source, evenly spaced; of a source of classes, all labels."""
    looked_at = spread(len(source), len(source) if getattr(source, "classes", ()) else _MAX_CAPTIONS)
    return [wording.text for item in looked_at for wording in wordings_of(source, item)]


def contact_sheet(source: Source, path: str | os.PathLike[str]) -> Path:
    """Write a PNG of evenly spaced samples of a source, each with the start of its caption; whole or not at all.

    Raises UserError if `path` cannot be written.
    """
    rows, columns = SHEET
    page = Image.new("RGB", (columns * TILE, rows * (TILE + _LABEL)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    classes: tuple[str, ...] = getattr(source, "classes", ())
    for place, item in enumerate(spread(len(source), rows * columns)):
        x, y = place % columns * TILE, place // columns * (TILE + _LABEL)
        text = source.text(item)
        text = classes[int(text)] if classes else text
        try:
            h, w = size_of(source, item, _TILES) if in_buckets(source) else (TILE, TILE)
            image = Image.fromarray(source.image(item, (h, w), (0.5, 0.5)))
            page.paste(image, (x + (TILE - w) // 2, y + (TILE - h) // 2))
        except BadImage as error:
            text = f"BAD: {error.reason}"
        text = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
        for line in range(2):
            draw.text((x + 2, y + TILE + 1 + 13 * line), text[20 * line : 20 * (line + 1)], "black", font)
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        page.save(part, "PNG")
        part.replace(target)
    return target


def spread(total: int, count: int) -> list[int]:
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
