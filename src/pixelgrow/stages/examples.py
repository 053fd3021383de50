"""Images of the data that stages look at: held-out ones, and some of those that are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pixelgrow.data.buckets import Shapes, size_of
from pixelgrow.data.images import BadImage
from pixelgrow.data.loader import to_tensor
from pixelgrow.data.sources.base import BadFile, Source
from pixelgrow.pictures import in_groups
from pixelgrow.stages.data import Origin


@dataclass(frozen=True)
class Examples:
    """Images of the data: where they come from, their captions and their sizes (h, w) in pixels.

    They are read when they are asked for. `size`: that of images without buckets. `bad`: files that could not be read.
    `encode`: images (B, 3, H, W) in [-1, 1] to what the stages work on.
    """

    size: tuple[int, int]
    captions: list[str]
    origins: list[Origin]
    sizes: list[tuple[int, int]]
    bad: list[tuple[Source, BadFile]]
    encode: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.origins)

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Some of the images (B, 3, H, W) in [-1, 1], which have one size."""
        images = [source.image(i, self.sizes[row]) for row in rows for source, i in [self.origins[row]]]
        return to_tensor(np.stack(images))

    def batch(self, rows: Iterable[int]) -> Tensor:
        """Some of the images (B, 3, h, w) in [-1, 1], which have one size, or their latents."""
        return self.encode(self.pixels(rows))

    @property
    def all_pixels(self) -> list[Tensor]:
        """All images, (3, H, W) each, at once; only for few of them."""
        return in_groups(self.sizes, lambda rows, _: self.pixels(rows))

    @property
    def images(self) -> list[Tensor]:
        """All images, or their latents, (3, h, w) each, at once; only for few of them."""
        return in_groups(self.sizes, lambda rows, _: self.batch(rows))


def decodable(n: int, shapes: Shapes, order: Iterable[Origin], encode: Callable[[Tensor], Tensor]) -> Examples:
    """The first `n` images of an order that can be decoded. `shapes`: in pixels."""
    captions: list[str] = []
    origins: list[Origin] = []
    sizes: list[tuple[int, int]] = []
    unreadable: list[tuple[Source, BadFile]] = []
    for source, i in order:
        if len(origins) == n:
            break
        size = size_of(source, i, shapes)
        try:
            source.image(i, size)
        except BadImage as bad:
            unreadable.append((source, BadFile(source.key(i), bad.reason)))
            continue
        captions.append(source.text(i))
        origins.append((source, i))
        sizes.append(size)
    return Examples(shapes.size, captions, origins, sizes, unreadable, encode)


def same(images: Tensor) -> Tensor:
    """What stages work on where they have no autoencoder: the images."""
    return images
