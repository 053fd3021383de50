"""The words of the built-in scenes and what they look like: colours, backgrounds, outlines."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (222, 36, 40),
    "orange": (246, 132, 16),
    "yellow": (252, 214, 28),
    "green": (28, 148, 64),
    "blue": (32, 78, 214),
    "purple": (138, 46, 172),
    "black": (22, 22, 26),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (240, 240, 238),
    "gray": (142, 144, 150),
    "black": (34, 34, 40),
    "yellow": (246, 226, 116),
    "green": (150, 208, 136),
    "blue": (138, 182, 240),
    "pink": (246, 176, 204),
    "brown": (122, 84, 54),
}
TONE = 14  # the two tones of a pattern are the background's colour plus and minus this, of 255
PATTERNS = ("plain", "striped", "checked", "dotted")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(rgb: NDArray[np.generic]) -> NDArray[np.float64]:
    """sRGB (..., 3) in [0, 255] to OKLab (..., 3) (Ottosson 2020), lightness in [0, 1]."""
    s = np.asarray(rgb, np.float64) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((np.maximum(s, 0) + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _LMS.T) @ _LAB.T)


@cache
def contrasting(background: str) -> tuple[str, ...]:
    """The object colours that stand out clearly against a background, never its own name."""

    def far(name: str) -> bool:
        one, two = np.array(COLOURS[name], float), np.array(BACKGROUNDS[background], float)
        return float(np.linalg.norm(one - two)) > 130 and float(np.linalg.norm(oklab(one) - oklab(two))) > 0.16

    return tuple(name for name in COLOURS if name != background and far(name))


def _reflect(x: Floats, y: Floats, nx: float, ny: float) -> tuple[Floats, Floats]:
    over = np.maximum(x * nx + y * ny, 0) * 2
    return np.asarray(x - over * nx, np.float32), np.asarray(y - over * ny, np.float32)


def distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Signed distance (negative inside) to an outline of about unit radius, at points x, y (y downwards).

    Exact along the edges and a lower bound beyond the corners, which is all that antialiasing needs.
    """
    if shape == "circle":
        return np.hypot(x, y) - np.float32(0.96)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - np.float32(0.74)) - np.float32(0.26)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86)
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(ax, ay) - np.float32(0.98), np.minimum(ax, ay) - np.float32(0.31))
    if shape == "triangle":  # apex up; base and apex at 0.9 and -0.95
        side = (np.abs(x) * np.float32(1.85) - (y + np.float32(0.95)) * np.float32(1.02)) / np.float32(
            np.hypot(1.85, 1.02)
        )
        return np.maximum(side, y - np.float32(0.9))
    if shape == "star":  # folded to a tenth of the plane, where it is one half-plane
        ax, up = np.abs(x), -(y - np.float32(0.07))
        ax, up = _reflect(ax, up, 0.809016994, -0.587785252)
        ax, up = _reflect(ax, up, -0.809016994, -0.587785252)
        ax = np.abs(ax)
        tip, inner = 1.1, 0.5
        px, py = inner * 0.587785252, inner * 0.809016994 - tip  # from the tip to the inner corner
        return np.asarray((-py * ax + px * (up - tip)) / np.hypot(px, py), np.float32)
    raise KeyError(shape)


SPIN = {
    "circle": 0.0,
    "ring": 0.0,
    "square": 0.12,
    "triangle": 0.12,
    "star": 0.16,
    "cross": 0.12,
}  # largest rotation, radians


def coverage(shape: str, h: int, w: int, cy: float, cx: float, radius: float, spin: float) -> Floats:
    """How much of each pixel (h, w) an outline covers, in [0, 1]; centre and radius in pixels, spin in radians."""
    y = ((np.arange(h, dtype=np.float32) + np.float32(0.5 - cy)) / np.float32(radius))[:, None]
    x = ((np.arange(w, dtype=np.float32) + np.float32(0.5 - cx)) / np.float32(radius))[None, :]
    c, s = np.float32(np.cos(spin)), np.float32(np.sin(spin))
    return np.clip(np.float32(0.5) - distance(shape, c * x + s * y, c * y - s * x) * np.float32(radius), 0, 1)
