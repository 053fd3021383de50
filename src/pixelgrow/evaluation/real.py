"""Real images that generated ones are compared with, and the prompts to generate from: their captions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelgrow.data.images import BadImage
from pixelgrow.data.order import Permutation
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.sources.base import Source, large_enough
from pixelgrow.data.sources.opening import open_images, open_source
from pixelgrow.errors import UserError

SCENES = 1_000_000  # scenes to choose from, each with a caption of its own: a number means the same in any count


@dataclass(frozen=True)
class Real:
    """Images of one size, in a fixed order; their captions.

    items: (source, number in it) of each. size: (h, w) in pixels that they are scaled and cropped to. fingerprint: of
    the sources and of the order. prompts: empty texts where there are no captions; labels in decimal for classes.
    """

    name: str
    fingerprint: str
    items: Sequence[tuple[Source, int]]
    size: tuple[int, int]
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, if the prompts are labels."""
        return getattr(self.items[0][0], "classes", ())

    @property
    def captioned(self) -> bool:
        """Whether the images have captions, not labels or nothing."""
        return all(self.prompts) and not self.classes

    def describe(self) -> dict[str, Any]:
        """What makes these images the same, as JSON; not how many of them are taken."""
        return {
            "source": self.name,
            "fingerprint": self.fingerprint,
            "size": list(self.size),
            "fitting": "shorter side to the size (Lanczos, antialiased), centre crop",
        }

    def images(self, numbers: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        """uint8 (B, 3, h, w) of the images that can be read, their numbers, and what is wrong with each of the rest."""
        pixels, kept, bad = [], [], []
        for number in numbers:
            source, i = self.items[number]
            try:
                pixels.append(source.image(i, self.size))
                kept.append(number)
            except BadImage as error:
                bad.append(f"{source.key(i)}: {error.reason}")
        empty = np.zeros((0, *self.size, 3), np.uint8)
        made = torch.from_numpy(np.stack(pixels) if pixels else empty)
        return made.permute(0, 3, 1, 2).contiguous(), kept, bad


def open_real(data: str, size: tuple[int, int], n: int, *, kind: str = "auto", captions: bool = True) -> Real:
    """The first `n` images of `data`, or all if it has fewer: scenes, a folder, tar shards.

    Scenes are of the held-out split. Other images are those of at least `size`, shuffled, always in the same order.
    captions: whether prompts are needed; without, any folder of images will do. Raises UserError for data without an
    image that is large enough.
    """
    if data == "scenes":
        return _first(Scenes(n=SCENES, captions=SCENES, split="heldout"), range(min(n, SCENES)), size)
    source = open_source({"source": data, "kind": kind}) if captions or kind != "auto" else open_images(data)
    return _first(source, itertools.islice(_order(source, size), n), size)


def open_train(data: str, size: tuple[int, int], n: int, *, kind: str = "auto") -> Real:
    """The first `n` training images, as in `open_real`; scenes are of the training split."""
    if data == "scenes":
        return _first(Scenes(n=SCENES, captions=SCENES, split="train"), range(min(n, SCENES)), size)
    return open_real(data, size, n, kind=kind, captions=False)


def _order(source: Source, size: tuple[int, int]) -> Iterator[int]:
    """Numbers of the images that are large enough, shuffled."""
    return filter(large_enough(source, size).__contains__, Permutation(len(source), "evaluation"))


def _first(source: Source, numbers: Iterable[int], size: tuple[int, int]) -> Real:
    items = [(source, i) for i in numbers]
    if not items:
        raise UserError(
            f"{source.name}: got {len(source)} images, none of {size[0]}x{size[1]} or larger, which is the size of the "
            "images to evaluate; name larger ones"
        )
    return Real(source.name, source.fingerprint, items, size, [source.text(i) for _, i in items])


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of a list of prompts."""
    return hashlib.sha256("\0".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()
