"""Where the objects of a scene go: rows of cells, one band of cells for each group."""

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from pixelgrow.data.scenes.captions import Spec, pick
from pixelgrow.data.scenes.vocabulary import SPIN

GAP = 0.07  # clear space between the contents of cells, of the shorter side (2.2 of 32 pixels)
WANDER = 0.3  # share of the free space in its cell that an object uses; with less, a model learns places sooner
LARGEST = (0.0, 0.44, 0.42, 0.38, 0.34, 0.32)  # greatest diameter by the number of objects in the scene
SCALE = {"small": 0.62, "": 0.92, "large": 1.18}
ROWS: tuple[tuple[tuple[int, ...], ...], ...] = (
    (),
    ((1,),),
    ((2,), (1, 1)),
    ((3,), (1, 2), (2, 1), (1, 1, 1)),
    ((4,), (2, 2), (1, 1, 1, 1)),
    ((2, 3), (3, 2), (2, 1, 2)),
)


@dataclass(frozen=True)
class Place:
    """An object's centre and radius in units of the image's shorter side, and its rotation in radians."""

    y: float
    x: float
    radius: float
    spin: float


def _cell(rows: tuple[int, ...], h: float, w: float) -> float:
    return min(h / len(rows), w / max(rows))


@lru_cache(maxsize=4096)
def _arrangements(count: int, h: float, w: float) -> tuple[tuple[bool, tuple[int, ...]], ...]:
    """Arrangements (columns instead of rows?, how many in each) whose cells are nearly as large as possible."""
    options = [(flip, rows) for rows in ROWS[count] for flip in (False, True)]
    sizes = [_cell(rows, *((w, h) if flip else (h, w))) for flip, rows in options]
    return tuple(o for o, size in zip(options, sizes, strict=True) if size >= 0.93 * max(sizes))


@lru_cache(maxsize=4096)
def _split(first: int, second: int, h: float, w: float) -> float:
    """The first band's share of the height that makes the smallest cell largest."""

    def smallest(share: float) -> float:
        bands = ((first, h * share), (second, h * (1 - share)))
        return min(max(_cell(r, *((w, b) if f else (b, w))) for r in ROWS[n] for f in (False, True)) for n, b in bands)

    shares = [0.36 + 0.02 * i for i in range(15)]
    best = max(smallest(s) for s in shares)
    good = [s for s in shares if smallest(s) >= best - 1e-9]
    return min(good, key=lambda s: abs(s - 0.5))


def _band(spec: Spec, which: int, box: tuple[float, float, float, float], rng: Random) -> list[Place]:
    group = spec.groups[which]
    top, left, h, w = box
    flip, rows = pick(rng, _arrangements(group.count, h, w))
    if flip:
        top, left, h, w = left, top, w, h
    room = _cell(rows, h, w) - GAP
    total = sum(g.count for g in spec.groups)
    size = min(room, LARGEST[total] * SCALE[group.size]) * (0.92 + 0.08 * rng.random())
    places = []
    for r, n in enumerate(rows):
        for c in range(n):
            slack_y, slack_x = h / len(rows) - GAP - size, w / n - GAP - size
            y = top + h / len(rows) * (r + 0.5) + WANDER * slack_y * (rng.random() - 0.5)
            x = left + w / n * (c + 0.5) + WANDER * slack_x * (rng.random() - 0.5)
            spin = SPIN[group.shape] * (2 * rng.random() - 1)
            places.append(Place(x, y, size / 2, spin) if flip else Place(y, x, size / 2, spin))
    return places


def layout(spec: Spec, h: float, w: float, rng: Random) -> list[list[Place]]:
    """Places of each group's objects on a canvas (h, w), whose shorter side is 1. Nothing touches."""
    edge = 0.005
    h, w = h - 2 * edge, w - 2 * edge
    if not spec.relation:
        return [_band(spec, 0, (edge, edge, h, w), rng)]
    one, two = (0, 1) if spec.relation in ("above", "left of") else (1, 0)
    counts = spec.groups[one].count, spec.groups[two].count
    if spec.relation in ("above", "below"):
        cut = h * _split(*counts, h, w)
        boxes = (edge, edge, cut, w), (edge + cut, edge, h - cut, w)
    else:
        cut = w * _split(*counts, w, h)
        boxes = (edge, edge, h, cut), (edge, edge + cut, h, w - cut)
    bands = {one: _band(spec, one, boxes[0], rng), two: _band(spec, two, boxes[1], rng)}
    return [bands[0], bands[1]]


def canvas(h: int, w: int) -> tuple[float, float]:
    """The image's sides in units of the shorter one; rounded so that equal aspects share an arrangement."""
    short = min(h, w)
    return tuple(math.floor(s / short * 1000 + 0.5) / 1000 for s in (h, w))  # type: ignore[return-value]
