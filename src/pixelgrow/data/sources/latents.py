"""Latents of a source's images: encoded once by an autoencoder, kept on the disk and memory-mapped."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pixelgrow.data.images import FRAME, BadImage, Frame
from pixelgrow.data.sources.base import (
    BadFile,
    Lanes,
    PassedOver,
    Source,
    Wording,
    bad_of,
    clears_of,
    files_of,
    hold,
    large_enough,
    passed_of,
    sides_of,
    strays_of,
    wordings_of,
)
from pixelgrow.writing import writing

CHUNK = 64  # images that are encoded and written at a time: no more is lost when the process is killed
PAUSE = 15.0  # seconds between two lines of progress
logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What is needed of an autoencoder."""

    @property
    def factor(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, images: Tensor, /) -> Tensor: ...


class Latents:
    """`source` with `image` giving latents, float32 (h, w, C), of the centre crop of h * factor by w * factor pixels.

    Only centre crops are encoded, so `crop` makes no difference and no image is mirrored. Sizes are counted in latents.
    `folder`: where `make` keeps them, in half precision.
    """

    mirror = False

    def __init__(self, source: Source, encoder: Encoder, channels: int, folder: Path) -> None:
        self.source, self.encoder, self.channels, self.folder = source, encoder, channels, folder
        self.name = source.name
        self.fingerprint = f"{source.fingerprint}-{encoder.fingerprint[:16]}"
        self.bad: Sequence[BadFile] = bad_of(source)
        self.passed: Sequence[PassedOver] = passed_of(source)
        self.strays: Sequence[BadFile] = strays_of(source)
        self.files = files_of(source)
        self.classes: tuple[str, ...] = getattr(source, "classes", ())
        self.several: bool = getattr(source, "several", False)
        self.frame: Frame = getattr(source, "frame", FRAME)
        self.captions: int | None = getattr(source, "captions", None)
        self.lanes: Lanes | None = getattr(source, "lanes", None)
        self._made: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # size: numbers of samples, latents

    @property
    def cuts(self) -> np.ndarray:
        cuts: np.ndarray = self.source.cuts  # type: ignore[attr-defined]
        return cuts

    def sides(self, part: slice) -> np.ndarray:
        return sides_of(self.source, part) // self.encoder.factor

    def clears(self, part: slice) -> np.ndarray:
        return clears_of(self.source, part)

    def __len__(self) -> int:
        return len(self.source)

    def size(self, i: int) -> tuple[int, int]:
        h, w = self.source.size(i)
        return h // self.encoder.factor, w // self.encoder.factor

    def text(self, i: int) -> str:
        return self.source.text(i)

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_of(self.source, i)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        numbers, latents = self._made.get(size, (np.empty(0, np.int64), np.empty(0)))
        row = int(np.searchsorted(numbers, i))
        if row < len(numbers) and numbers[row] == i and np.isfinite(latents[row]).all():
            return latents[row].astype(np.float32).transpose(1, 2, 0)
        return self._encode([self._pixels(i, size)])[0].transpose(1, 2, 0)

    def make(self, size: tuple[int, int]) -> None:
        """Encode every image that is large enough, and resume if it was interrupted. A bad image is left as NaN."""
        numbers = np.asarray(large_enough(self, size))
        shape = (self.channels, *size)
        path = self.folder / f"{self.fingerprint}-{size[0]}x{size[1]}.f16"
        item = 2 * int(np.prod(shape))  # bytes
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                first = len(numbers)
                if file.tell() != first * item:
                    first = file.tell() // (CHUNK * item) * CHUNK
                    file.truncate(first * item)
                began = said = time.monotonic()
                for start in range(first, len(numbers), CHUNK):
                    self._hold(numbers[start : start + CHUNK])
                    file.write(self._chunk(numbers[start : start + CHUNK], size).tobytes())
                    if time.monotonic() - said > PAUSE:
                        said = time.monotonic()
                        done = start + CHUNK
                        speed = (done - first) / (said - began)
                        logger.info("%s: %d of %d latents, %.3g a second", self.name, done, len(numbers), speed)
        hold(self.source, (), ())
        self._made[size] = numbers, np.memmap(path, np.float16, "r", shape=(len(numbers), *shape))

    def _hold(self, numbers: np.ndarray) -> None:
        """Have the shards of some samples, and the one behind them, fetched whole."""
        if self.lanes is not None:
            cuts = self.cuts
            shards = np.unique(np.searchsorted(cuts, numbers, side="right") - 1).tolist()
            hold(self.source, shards, [shards[-1] + 1] if shards[-1] + 2 < len(cuts) else ())

    def _chunk(self, numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        images: dict[int, np.ndarray] = {}
        for row, i in enumerate(numbers):
            try:
                images[row] = self._pixels(int(i), size)
            except BadImage:  # the loader finds it too, and lists it
                continue
        found = np.full((len(numbers), self.channels, *size), np.nan, np.float16)
        if images:
            found[list(images)] = self._encode(list(images.values()))
        return found

    def _pixels(self, i: int, size: tuple[int, int]) -> np.ndarray:
        f = self.encoder.factor
        return self.source.image(i, (f * size[0], f * size[1]))

    def _encode(self, images: list[np.ndarray]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)) / 127.5 - 1
        return self.encoder.encode(pixels).numpy()
