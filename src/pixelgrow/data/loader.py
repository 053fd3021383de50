"""Batches of training images, decoded in the stream's order.

An image that cannot be decoded is replaced by another. The batches are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.buckets import Bucket, Shapes, filled, usable
from pixelgrow.data.feed import CPU, Packet, fed
from pixelgrow.data.images import BadImage
from pixelgrow.data.lanes import order_of
from pixelgrow.data.order import BucketOrder, Draw, Order
from pixelgrow.data.sources.base import BadFile, Source, chosen, hold, in_buckets, sizes_of, wordings_of
from pixelgrow.data.sources.selection import Selection
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond, cond_of
from pixelgrow.pictures import to_float
from pixelgrow.rng import uniform

_MAX_ATTEMPTS = 100  # replacements that are tried for one image


class Encoded(Protocol):
    """Encodings of captions; `text.cache.TextCache` has them."""

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What `cond_of` makes their conditions of."""
        ...

    def room(self, count: int) -> int:
        """The most bytes of the arrays of so many captions."""
        ...


@dataclass(frozen=True)
class Batch:
    """A batch for training.

    `image`: (B, 3, H, W) uint8, or in [-1, 1], or latents (B, C, h, w); `pictures.to_float` takes them all. `text`: B
    captions; of classes, labels in decimal. `index`: (B,) int64, positions in the training stream; a sample's
    randomness is a function of the seed and its index. `caption`: (B,) int64, which of its sample's captions each text
    is. `cond`: the captions' conditions, if the loader has their encodings.
    """

    image: Tensor
    text: tuple[str, ...]
    index: Tensor
    caption: Tensor | None = None
    cond: Cond | None = None

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Said:
    """What a worker sends beside arrays: see `Raw`. `target_text`: captions of pairs."""

    text: tuple[str, ...]
    caption: tuple[int, ...]
    bad: tuple[tuple[int, BadFile], ...]
    target_text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raw:
    """A batch as it is loaded.

    `image`: uint8 (B, 3, H, W), or float32 latents. `text`: B captions. `bad`: (source number, file) of each bad file
    that was met. `origin`: (B, 2) int64, the number of each image's source, and its number in that source. `caption`:
    (B,) int64, which of its sample's captions each text is.
    """

    image: np.ndarray
    text: tuple[str, ...]
    bad: tuple[tuple[int, BadFile], ...]
    origin: np.ndarray
    caption: np.ndarray


class Loader:
    """An endless, exactly resumable stream of batches.

    - `weights`: share of images from each source; None: in proportion to their usable images.
    - `size` (h, w): in pixels. Images that are smaller on either side are left out.
    - `stride`: of the sizes of buckets (`buckets.Shapes`); None: every image has `size`.
    - `group`: number of positions of a step, a multiple of `batch`: their images have one size, and lanes of shards are
      equal parts of them (`data.lanes`). None: a batch, and no lanes.
    - `flip`: mirror half of the images. Sources with `mirror` False are never mirrored.
    - `random_crop`: crop anywhere along the longer side; else at the centre.
    - `workers`: processes that decode; 0 decodes in this process. The batches do not depend on it.
    - `device`: of the batches' images, which are sent there while the batch before is worked on.
    - `text`: encodings of all captions, to be sent with the images.
    - `bad_limit`, `bad_path`: as in `BadFiles`.

    A sample with several captions has one of them each time, chosen at random by their weights.

    A sample that cannot be decoded is replaced by another of its source, chosen by (seed, position). So the content of
    a position is a function of the seed and the files, wherever the stream starts.

    Raises `UserError` if no image is large enough, or if too many files are bad.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        size: tuple[int, int],
        stride: int | None = None,
        batch: int = 64,
        group: int | None = None,
        seed: int = 0,
        flip: bool = False,
        random_crop: bool = True,
        workers: int = 0,
        bad_limit: float = 0.01,
        bad_path: str | os.PathLike[str] | None = None,
        device: torch.device = CPU,
        text: Encoded | None = None,
    ) -> None:
        self.sources: list[Source] = list(sources) if isinstance(sources, Sequence) else [sources]
        if batch < 1 or workers < 0 or min(size) < 1:
            raise UserError(f"loader: got batch {batch}, workers {workers}, size {size}; expected >= 1, >= 0 and >= 1")
        if not self.sources:
            raise UserError("loader: got no sources, expected at least one")
        self.size, self.batch, self.seed, self.workers, self.device = size, batch, seed, workers, device
        self.text = text
        self.mirror, self.random_crop = mirrored(self.sources, flip), random_crop
        self.several = has_several(self.sources)
        shapes = Shapes(size, stride)
        self.usable = [some_usable(source, shapes) for source in self.sources]
        self.buckets = [Bucket(size, tuple(self.usable))]
        self.order: Order | BucketOrder
        if stride is not None and any(map(in_buckets, self.sources)):
            self.buckets = filled(self.sources, shapes)
            counts = [[len(items) for items in bucket.items] for bucket in self.buckets]
            self.order = BucketOrder(counts, weights, seed, group or batch)
        else:
            self.order = order_of(self.sources, self.usable, weights, seed, group)
        self.bad = BadFiles(self.sources, bad_limit, bad_path)

    def __len__(self) -> int:
        """Number of samples that are in a bucket."""
        return sum(len(items) for items in self.usable)

    def texts(self, about: int | None = None) -> Iterator[str]:
        """Each distinct caption of the usable samples, once; `about`: of so many samples at most, evenly spread."""
        seen: set[int] = set()
        columns: list[Sequence[int] | np.ndarray | Selection] = []
        for source, items in zip(self.sources, self.usable, strict=True):
            period = getattr(source, "captions", None)  # of scenes: samples i and i + captions have the same one
            columns.append(items if period is None else np.unique(np.asarray(items) % period))
        step = -(-sum(map(len, columns)) // about) if about else 1
        first = 0  # in this source
        for source, column in zip(self.sources, columns, strict=True):
            places = range(first, len(column), step)
            first = (first - len(column)) % step
            for item in column if step == 1 else (column[place] for place in places):
                for wording in wordings_of(source, int(item)):
                    if hash(wording.text) not in seen:
                        seen.add(hash(wording.text))
                        yield wording.text

    def batches(self, start: int = 0, step: int | None = None) -> Generator[Batch, None, None]:
        """Batches without end, at the positions start, start + step, ... of the stream. Close it to stop the workers.

        `step`: the size of a batch if None, so that no image is left out.
        """
        for tensors, said, at in self.stream(self.packet, self.room, start, step):
            index, caption = torch.arange(at, at + self.batch), torch.tensor(said.caption)
            yield Batch(tensors["image"], said.text, index, caption, cond_of(tensors) if self.text else None)

    def stream(
        self, work: Callable[[int], Packet], room: int, start: int, step: int | None = None
    ) -> Generator[tuple[dict[str, Tensor], Said, int], None, None]:
        """Tensors and texts of the packets that workers make of the positions start, start + step, ..., and these.

        The rest of each packet is a `Said` or a `UserError`. `room`: the most bytes of a packet's arrays.
        """
        starts = itertools.count(start, step or self.batch)
        with self._holding(), contextlib.closing(fed(work, starts, self.workers, room, self.device)) as packets:
            for at, (tensors, said) in zip(itertools.count(start, step or self.batch), packets, strict=True):
                if isinstance(said, UserError):
                    raise said
                for source, bad in said.bad:
                    self.bad.add(source, [bad])
                yield tensors, said, at

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Let go of all shards at the end."""
        try:
            yield
        finally:
            for source in self.sources:
                hold(source, (), ())

    def packet(self, start: int) -> Packet:
        """The batch at position `start`, as a worker sends it."""
        try:
            raw = self.load(start)
        except UserError as error:  # sent, as an exception in a worker arrives with its whole traceback
            return Packet({}, error)
        encoded = self.text.arrays(raw.text) if self.text else {}
        return Packet({"image": raw.image, **encoded}, Said(raw.text, tuple(raw.caption.tolist()), raw.bad))

    @property
    def room(self) -> int:
        """Bytes of the arrays of a packet, at most: no bucket's size has more pixels."""
        h, w = self.size
        channels = getattr(self.sources[0], "channels", None)
        pixel = np.dtype(np.float32).itemsize * channels if channels else 3
        return self.batch * h * w * pixel + (self.text.room(self.batch) if self.text else 0)

    def load(self, start: int, decode: bool = True) -> Raw:
        """Load the batch at position `start` in this process.

        Without `decode`, `image` is empty (B, C, 0, 0), and samples that cannot be decoded are not replaced.
        """
        positions = range(start, start + self.batch)
        for number, (now, ahead) in self.order.needs(positions).items() if decode else ():
            hold(self.sources[number], now, ahead)
        draws = [self.order.at(position) for position in positions]
        (bucket,) = {draw.bucket for draw in draws}  # `start` is a multiple of the batch, and so is a group
        centre = [0.5] * self.batch
        # One number serves both sides: only the longer one has room to crop.
        crop = uniform(self.seed, "crop", positions).tolist() if self.random_crop else centre
        mirror = uniform(self.seed, "flip", positions).tolist() if any(self.mirror) else centre
        words = uniform(self.seed, "caption", positions).tolist() if self.several else [0.0] * self.batch
        latents = getattr(self.sources[0], "channels", None)
        size = self.buckets[bucket].size if decode else (0, 0)
        image = np.empty((self.batch, latents or 3, *size), np.float32 if latents else np.uint8)
        texts: list[str] = []
        bad: list[tuple[int, BadFile]] = []
        origin, caption = np.empty((self.batch, 2), np.int64), np.zeros(self.batch, np.int64)
        for row, draw in enumerate(draws):
            if decode:
                pixels, origin[row] = self._sample(draw, (crop[row], crop[row]), mirror[row] < 0.5, bad)
                image[row] = pixels.transpose(2, 0, 1)
            else:
                origin[row] = draw.source, self._item(draw)
            source, item = (int(v) for v in origin[row])
            wordings = wordings_of(self.sources[source], item)
            caption[row] = chosen(wordings, words[row])
            texts.append(wordings[caption[row]].text)
        return Raw(image, tuple(texts), tuple(bad), origin, caption)

    def _item(self, draw: Draw) -> int:
        """A sample's number in its source."""
        return self.buckets[draw.bucket].items[draw.source][draw.item]

    def _sample(
        self, first: Draw, crop: tuple[float, float], mirror: bool, bad: list[tuple[int, BadFile]]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The image (h, w, C) of a draw, or instead of it, and its origin. Bad files that are met are appended to
        `bad`."""
        draw = first
        for attempt in range(_MAX_ATTEMPTS):
            source, item = self.sources[draw.source], self._item(draw)
            try:
                pixels = source.image(item, self.buckets[draw.bucket].size, crop)
                return pixels[:, ::-1] if mirror and self.mirror[draw.source] else pixels, (draw.source, item)
            except BadImage as error:
                bad.append((draw.source, BadFile(source.key(item), error.reason)))
                draw = self.order.instead(first, attempt)
        raise UserError(
            f"{source.name}: {_MAX_ATTEMPTS} images in a row cannot be decoded (the last: {bad[-1][1].key}: "
            f"{bad[-1][1].reason}); repair or remove them"
        )


def has_several(sources: Sequence[Source]) -> bool:
    """Whether some sample has several captions."""
    return any(getattr(source, "several", False) for source in sources)


def mirrored(sources: Sequence[Source], flip: bool) -> list[bool]:
    """Which sources `flip` mirrors. Raises `UserError` for `flip` if none may be mirrored."""
    may = [getattr(source, "mirror", True) for source in sources]
    if flip and not any(may):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"flip: true would make captions of {names} untrue (left of, right of): leave flip out")
    return [flip and m for m in may]


def to_tensor(image: np.ndarray) -> Tensor:
    """Images uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]; float32 latents (B, h, w, C) -> (B, C, h, w)."""
    return to_float(torch.from_numpy(image).permute(0, 3, 1, 2)).contiguous()


def take(source: Source, count: int, size: tuple[int, int]) -> Batch:
    """The first `count` samples of a source that are large enough and can be decoded, cropped at the centre.

    `index` counts from 0. There may be fewer samples. Raises `UserError` if there is none.
    """
    images: list[np.ndarray] = []
    texts: list[str] = []
    for item in some_usable(source, Shapes(size)):
        if len(images) == count:
            break
        try:
            image, text = source.image(int(item), size, (0.5, 0.5)), source.text(int(item))
        except BadImage:
            continue
        images.append(image)
        texts.append(text)
    if not images:
        raise UserError(f"{source.name}: none of its images can be decoded; pixelgrow data shows why")
    return Batch(to_tensor(np.stack(images)), tuple(texts), torch.arange(len(images)))


def some_usable(source: Source, shapes: Shapes) -> Selection:
    """`buckets.usable` samples of a source. Raises `UserError` if there is none."""
    items = usable(source, shapes)
    if not len(items):
        h, w = shapes.size
        largest = int(sizes_of(source).min(axis=1).max(initial=0))
        what = (
            f"fits a bucket of the area of {h}x{w}" if in_buckets(source) and shapes.stride else f"is at least {h}x{w}"
        )
        raise UserError(
            f"{source.name}: none of its {len(source)} images {what} pixels (the largest has a smaller side of "
            f"{largest}); lower the stage's resolution or add larger images"
        )
    return items
