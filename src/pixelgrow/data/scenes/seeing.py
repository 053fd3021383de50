"""From pixels to a list of objects: background, components, their colour, shape and place. Knows no caption."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pixelgrow.data.scenes.vocabulary import BACKGROUNDS, COLOURS, SHAPES, SPIN, coverage, oklab
from pixelgrow.errors import UserError

Floats = NDArray[np.float32]
# A pixel within this RGB distance (of 441) of the background is background. A pattern's two tones are 48.5 apart, and
# the border may show only one of them.
LEAST_CONTRAST = 52.0
SPECK = 0.007  # components below this share of the image are specks (7 pixels of 32x32)
WORKING = 64  # larger images are box-reduced until the shorter side is below twice this
GRID = 13  # shapes are compared on a grid of GRID x GRID samples
SPAN = 1.9  # of half-width SPAN, in units of the radius of a disc of equal area


@dataclass(frozen=True)
class Seen:
    """One object: names of its colour and shape, its centre in units of height and width."""

    colour: str
    shape: str
    y: float
    x: float


@dataclass(frozen=True)
class View:
    """What is in an image."""

    background: str
    objects: tuple[Seen, ...]


_INKS, _GROUNDS = oklab(np.array(list(COLOURS.values()))), oklab(np.array(list(BACKGROUNDS.values())))


def _nearest(rgb: NDArray[np.generic], palette: NDArray[np.float64]) -> int:
    return int(((palette - oklab(rgb)) ** 2).sum(-1).argmin())


def _reduce(image: Floats) -> Floats:
    h, w, _ = image.shape
    k = max(1, min(h, w) // WORKING)
    if k == 1:
        return image
    h, w = h // k * k, w // k * k
    rows = image[:h, :w].reshape(h // k, k, w, 3).mean(1)
    return np.asarray(rows.reshape(h // k, w // k, k, 3).mean(2))


def _around(image: Floats) -> Floats:
    """The pixels (N, 3) along the border that agree with each other."""
    b = max(1, min(image.shape[:2]) // 32)
    ring = np.concatenate(
        [image[:b].reshape(-1, 3), image[-b:].reshape(-1, 3), image[:, :b].reshape(-1, 3), image[:, -b:].reshape(-1, 3)]
    )
    near = np.linalg.norm(ring - np.median(ring, axis=0), axis=1) < 1.6 * LEAST_CONTRAST
    return np.asarray(ring[near])


def _off_background(image: Floats, around: Floats) -> Floats:
    """Distance (h, w) of each pixel from the segment between the background's darker and lighter tone."""
    low, high = np.percentile(around, (10, 90), axis=0).astype(np.float32)
    axis = high - low
    along = np.clip((image - low) @ axis / max(float(axis @ axis), 1e-6), 0, 1)
    rest = image - low - along[..., None] * axis
    return np.asarray(np.sqrt(np.einsum("hwc,hwc->hw", rest, rest)))


def _spread_max(a: Floats, r: int) -> Floats:
    """The largest value within r rows and columns."""
    for _ in range(r):
        wide = a.copy()
        np.maximum(wide[1:], a[:-1], out=wide[1:])
        np.maximum(wide[:-1], a[1:], out=wide[:-1])
        a = wide.copy()
        np.maximum(a[:, 1:], wide[:, :-1], out=a[:, 1:])
        np.maximum(a[:, :-1], wide[:, 1:], out=a[:, :-1])
    return a


def components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Labels (h, w) of the 4-connected parts of a mask, 0 outside, by union of horizontal runs."""
    h, w = mask.shape
    edge = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edge == 1)
    _, stops = np.nonzero(edge == -1)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    above = 0
    for i, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        j = above
        while j < i and runs[j][0] == row - 1 and runs[j][1] < stop:
            a, b = root(i), root(j)
            parent[max(a, b)] = min(a, b)
            j += 1
    names: dict[int, int] = {}
    labels = np.zeros((h, w), np.int32)
    for i, (row, start, stop) in enumerate(runs):
        labels[row, start:stop] = names.setdefault(root(i), len(names) + 1)
    return labels


def _samples(alpha: Floats) -> Floats:
    """Coverage (h, w) on the normal grid (GRID * GRID,): centred, scaled to equal area, of zero mean and unit norm."""
    h, w = alpha.shape
    mass = max(float(alpha.sum()), 1e-6)
    cy = float(alpha.sum(1) @ np.arange(h)) / mass
    cx = float(alpha.sum(0) @ np.arange(w)) / mass
    unit = np.linspace(-SPAN, SPAN, GRID) * np.sqrt(mass / np.pi)
    padded = np.zeros((h + 4, w + 4), np.float32)
    padded[2:-2, 2:-2] = alpha

    def taps(centre: float, size: int) -> tuple[NDArray[np.int64], Floats]:
        at = np.clip(centre + unit, -1.5, size + 0.5) + 2
        lower = at.astype(np.int64)
        return lower, (at - lower).astype(np.float32)

    (y, fy), (x, fx) = taps(cy, h), taps(cx, w)
    rows = padded[y] * (1 - fy)[:, None] + padded[y + 1] * fy[:, None]
    grid = (rows[:, x] * (1 - fx) + rows[:, x + 1] * fx).ravel()
    grid = grid - grid.mean()
    return np.asarray(grid / max(float(np.linalg.norm(grid)), 1e-6), np.float32)


@cache
def _templates() -> tuple[NDArray[np.int64], Floats]:
    """Shape numbers (K,) and normal grids (K, GRID * GRID) of every shape at several sizes, rotations and offsets."""
    owner, grids = [], []
    for s, shape in enumerate(SHAPES):
        spins = np.linspace(-1.6, 1.6, 7) * SPIN[shape] if SPIN[shape] else (0.0,)
        for radius in (3.2, 4.2, 5.5, 8.0, 13.0):
            n = int(2.6 * radius) + 4
            for spin in spins:
                for shift in (0.0, 0.5):
                    owner.append(s)
                    grids.append(_samples(coverage(shape, n, n, n / 2 + shift, n / 2 + shift / 2, radius, float(spin))))
    return np.array(owner), np.stack(grids)


def name_shape(alpha: Floats) -> str:
    """The vocabulary's shape that resembles a coverage map (h, w) of one object most."""
    owner, grids = _templates()
    return SHAPES[int(owner[int((grids @ _samples(alpha)).argmax())])]


def look(image: NDArray[np.uint8]) -> View:
    """What is in an image, uint8 (h, w, 3) of at least 16 pixels a side. Raises UserError for anything else."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 16:
        raise UserError(
            f"checker: got an image of shape {image.shape} and type {image.dtype}, expected uint8 (h, w, 3) with "
            "at least 16 pixels a side; convert or enlarge it"
        )
    pixels = _reduce(image.astype(np.float32))
    h, w, _ = pixels.shape
    around = _around(pixels)
    ground = around.mean(0)
    away = _off_background(pixels, around)
    reach = max(1, round(min(h, w) / 32))
    labels = components(away > np.maximum(LEAST_CONTRAST, 0.5 * _spread_max(away, reach)))
    objects = []
    all_ys, all_xs = np.nonzero(labels)
    owner = labels[all_ys, all_xs]
    for k in np.flatnonzero(np.bincount(owner) >= SPECK * h * w):
        ys, xs = all_ys[owner == k], all_xs[owner == k]
        inside = pixels[ys, xs]
        far = away[ys, xs]
        ink = np.median(inside[far >= np.partition(far, len(far) * 3 // 5)[len(far) * 3 // 5]], axis=0)
        y0, y1, x0, x1 = max(0, ys.min() - 1), ys.max() + 2, max(0, xs.min() - 1), xs.max() + 2
        axis = ink - ground
        alpha = np.clip((pixels[y0:y1, x0:x1] - ground) @ axis / max(float(axis @ axis), 1.0), 0, 1)
        own = _spread_max((labels[y0:y1, x0:x1] == k).astype(np.float32), 1)
        shape = name_shape(np.asarray(alpha * own, np.float32))
        place = float(ys.mean() + 0.5) / h, float(xs.mean() + 0.5) / w
        objects.append(Seen(tuple(COLOURS)[_nearest(ink, _INKS)], shape, *place))
    return View(tuple(BACKGROUNDS)[_nearest(ground, _GROUNDS)], tuple(objects))
