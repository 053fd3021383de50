"""The built-in data: captioned vector scenes, rendered at any size, a pure function of (seed, split, index)."""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pixelgrow.data.scenes import captions as text
from pixelgrow.data.scenes.captions import Group, Spec, pick
from pixelgrow.data.scenes.layout import canvas, layout
from pixelgrow.data.scenes.questions import Question, questions
from pixelgrow.data.scenes.seeing import Seen, View
from pixelgrow.data.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    RELATIONS,
    SHAPES,
    TONE,
    contrasting,
    coverage,
)
from pixelgrow.errors import UserError

VERSION = 2  # raise it when the same index gives another image or caption
HELD_OUT = 16  # one composition in this many is kept out of training
MOST = 5  # objects in an image
# How many objects a group or two groups have, the fewer the oftener: a total of n has 6 - n tickets, squared for pairs.
SINGLES = tuple((n,) for n in range(1, MOST + 1) for _ in range(MOST + 1 - n))
PAIRS = tuple((a, b) for a in range(1, MOST) for b in range(1, MOST + 1 - a) for _ in range((MOST + 1 - a - b) ** 2))
MAX_SCENES = 100_000_000  # images of a source: a shuffled order takes 24 bytes each
SPLITS = ("train", "heldout")
World = Literal["full", "simple", "few"]
WORLDS = get_args(World)
SETTINGS = ("n", "captions", "seed", "split", "world")  # arguments of `Scenes`, as recipes have them
# `simple`: what a small model learns to draw: a few clear words in one wording, plain grounds, three objects at most.
# `few`: what a few minutes of training learn: two objects at most, which are large, of shapes that 16 pixels can show.
SIMPLE_GROUNDS = ("white", "gray", "black", "pink")
SIMPLE_COLOURS = ("red", "yellow", "green", "blue", "white")
SIMPLE_SHAPES = ("circle", "square", "triangle", "star")
FEW_SHAPES = ("circle", "square", "triangle", "ring")
Image = NDArray[np.uint8]


def _rng(*keys: int | str) -> Random:
    """A Mersenne Twister seeded by the keys; only `.random()` is used, which Python keeps stable across versions."""
    digest = hashlib.blake2b("\0".join(map(str, keys)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "little"))


def split_of(spec: Spec) -> str:
    """The split a composition (groups and relation, whatever the background) belongs to, for every seed."""
    digest = hashlib.blake2b(spec.canonical().encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "little") % HELD_OUT == 0 else "train"


def _two_of(colours: tuple[str, ...], rng: Random) -> tuple[str, str]:
    first = pick(rng, colours)
    return first, pick(rng, tuple(c for c in colours if c != first))


def _draw_spec(rng: Random) -> Spec:
    background, pattern = "white", "plain"
    if rng.random() < 0.78:
        background = pick(rng, tuple(BACKGROUNDS))
        if rng.random() < 0.4:
            pattern = pick(rng, PATTERNS[1:])
    colours = contrasting(background)
    two = rng.random() < 0.6
    counts = pick(rng, PAIRS if two else SINGLES)
    used = _two_of(colours, rng)
    sized = rng.random() < 0.3 and sum(counts) <= 3
    groups = tuple(
        Group(n, c, pick(rng, SHAPES), pick(rng, ("small", "large")) if sized else "")
        for n, c in zip(counts, used[: len(counts)], strict=True)
    )
    return Spec(groups, pick(rng, RELATIONS) if two else "", background, pattern)


class _Plainest(Random):
    """Chance that always chooses a caption's most usual wording."""

    def random(self) -> float:
        return 0.5


@dataclass(frozen=True)
class _Plain:
    """A world of few words in one wording, on plain grounds. Sizes are not said."""

    shapes: tuple[str, ...]
    singles: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, ...], ...]
    size: str = ""

    def draw(self, rng: Random) -> Spec:
        background = pick(rng, SIMPLE_GROUNDS)
        colours = tuple(c for c in SIMPLE_COLOURS if c in contrasting(background))
        two = rng.random() < 0.5
        counts = pick(rng, self.pairs if two else self.singles)
        used = _two_of(colours, rng)[: len(counts)]
        groups = tuple(Group(n, c, pick(rng, self.shapes), self.size) for n, c in zip(counts, used, strict=True))
        return Spec(groups, pick(rng, RELATIONS) if two else "", background, "plain")

    def caption(self, spec: Spec) -> str:
        groups = tuple(replace(g, size="") for g in spec.groups)
        return text.caption(replace(spec, groups=groups), _Plainest())


PLAIN = {
    "simple": _Plain(SIMPLE_SHAPES, ((1,), (1,), (2,), (3,)), ((1, 1), (1, 1), (1, 2), (2, 1))),
    "few": _Plain(FEW_SHAPES, ((1,), (2,)), ((1, 1),), "large"),
}


@lru_cache(maxsize=200_000)
def _spec(world: str, seed: int, split: str, c: int) -> tuple[Spec, str]:
    plain = PLAIN.get(world)
    draw = plain.draw if plain else _draw_spec
    rng = _rng("scene", VERSION, seed, split, c)
    spec = draw(rng)
    while split_of(spec) != split:
        spec = draw(rng)
    return spec, plain.caption(spec) if plain else text.caption(spec, rng)


def _backdrop(spec: Spec, h: int, w: int, rng: Random) -> NDArray[np.float32]:
    """The background (h, w, 3) in [0, 255]: one colour, or two near tones of it in a pattern."""
    base = np.array(BACKGROUNDS[spec.background], np.float32)
    shift = np.float32(5 * (2 * rng.random() - 1))
    period, turn, py, px = 0.22 + 0.1 * rng.random(), rng.random(), rng.random(), rng.random()
    base = base + shift
    if spec.pattern == "plain":
        return np.broadcast_to(base, (h, w, 3)).copy()
    step = np.float32(min(h, w) * period)  # pixels in a period
    y = ((np.arange(h, dtype=np.float32) + 0.5) / step + np.float32(py))[:, None]
    x = ((np.arange(w, dtype=np.float32) + 0.5) / step + np.float32(px))[None, :]

    def wave(t: NDArray[np.float32]) -> NDArray[np.float32]:  # signed distance to the edges of a square wave, in pixels
        return (np.float32(0.25) - np.abs(t - np.floor(t) - np.float32(0.5))) * step

    if spec.pattern == "striped":
        d = (
            np.broadcast_to(wave(y) if turn < 0.35 else wave(x), (h, w))
            if turn < 0.7
            else wave((x + y) * np.float32(0.7071))
        )
        tone = np.clip(d, -0.5, 0.5) * 2
    elif spec.pattern == "checked":
        tone = np.clip(wave(y / 1.3), -0.5, 0.5) * np.clip(wave(x / 1.3), -0.5, 0.5) * 4
    else:
        dy, dx = y - np.floor(y) - np.float32(0.5), x - np.floor(x) - np.float32(0.5)
        tone = np.clip((np.float32(0.29) - np.hypot(dy, dx)) * step, -0.5, 0.5) * 2
    return np.clip(base + tone[..., None] * np.float32(TONE), 0, 255)


@dataclass(frozen=True)
class Scene:
    """A captioned scene, not rendered yet."""

    caption: str
    spec: Spec
    key: tuple[int, str, int]  # seed, split, index: the randomness of the layout

    @property
    def questions(self) -> tuple[Question, ...]:
        """What the caption claims, as questions for the checker; a background left unsaid is white."""
        return questions(self.spec)

    def render(self, h: int, w: int) -> Image:
        """The image, uint8 (h, w, 3), antialiased; the same scene at every size of one aspect ratio.

        Raises UserError below 16 pixels a side, where shapes cannot be recognised.
        """
        if min(h, w) < 16:
            raise UserError(f"scenes: got a size of {h}x{w}, expected at least 16 pixels a side; render it larger")
        rng = _rng("layout", VERSION, *self.key)
        placed = layout(self.spec, *canvas(h, w), rng)
        image = _backdrop(self.spec, h, w, rng)
        short = min(h, w)
        for group, places in zip(self.spec.groups, placed, strict=True):
            ink = np.array([c + 8 * (2 * rng.random() - 1) for c in COLOURS[group.colour]], np.float32)
            for place in places:
                cy, cx, r = place.y * short, place.x * short, place.radius * short
                reach = 1.25 * r + 1
                y0, x0 = max(0, int(cy - reach)), max(0, int(cx - reach))
                y1, x1 = min(h, int(cy + reach) + 1), min(w, int(cx + reach) + 1)
                alpha = coverage(group.shape, y1 - y0, x1 - x0, cy - y0, cx - x0, r, place.spin)[..., None]
                patch = image[y0:y1, x0:x1]
                patch += alpha * (ink - patch)
        return np.asarray(np.clip(image + 0.5, 0, 255), np.uint8)

    def view(self) -> View:
        """What is in the square image: the ground truth for tests of `seeing.look`."""
        placed = layout(self.spec, 1.0, 1.0, _rng("layout", VERSION, *self.key))
        groups = zip(self.spec.groups, placed, strict=True)
        objects = (Seen(g.colour, g.shape, p.y, p.x) for g, places in groups for p in places)
        return View(self.spec.background, tuple(objects))


class Scenes:
    """A source of `n` images under `captions` distinct captions (sample i has caption i % captions).

    The content and its caption depend on (seed, split, i % captions); positions, sizes, rotation and shades on
    (seed, split, i). No composition of the "heldout" split is in "train", for any seed. `world`: `full`; `simple`, with
    fewer words and objects on plain grounds; or `few`, with two large objects at most.
    """

    name = "scenes"
    mirror = False  # captions say "left of"

    def __init__(
        self, n: int = 1_000_000, captions: int = 50_000, seed: int = 0, split: str = "train", world: str = "full"
    ) -> None:
        if not 1 <= n <= MAX_SCENES or captions < 1:
            raise UserError(
                f"scenes: got n={n} and captions={captions}, expected n from 1 to {MAX_SCENES} and captions from 1; "
                "correct the recipe"
            )
        if split not in SPLITS:
            raise UserError(f"scenes: got split={split!r}, expected one of {', '.join(SPLITS)}; correct the recipe")
        if world not in WORLDS:
            raise UserError(f"scenes: got world={world!r}, expected one of {', '.join(WORLDS)}; correct the recipe")
        self.n, self.captions, self.seed, self.split, self.world = n, captions, seed, split, world
        told = f"{VERSION} {n} {captions} {seed} {split}" + ("" if world == "full" else f" {world}")
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        """Sample i, 0 <= i < len(self)."""
        if not 0 <= i < self.n:
            raise IndexError(i)
        spec, words = _spec(self.world, self.seed, self.split, i % self.captions)
        return Scene(words, spec, (self.seed, self.split, i))

    @property
    def sizes(self) -> NDArray[np.int32]:
        """All original sizes (N, 2)."""
        return np.broadcast_to(np.array(self.size(0), np.int32), (len(self), 2))

    def size(self, i: int) -> tuple[int, int]:
        """A size that is large enough for every stage: a scene has no resolution of its own."""
        return (1024, 1024)

    def text(self, i: int) -> str:
        """The caption of sample i."""
        return self.scene(i).caption

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> Image:
        """Sample i rendered at `size` (h, w), uint8 (h, w, 3); `crop` makes no difference."""
        return self.scene(i).render(*size)

    def key(self, i: int) -> str:
        """A name for sample i."""
        return f"{self.split}/{i}"
