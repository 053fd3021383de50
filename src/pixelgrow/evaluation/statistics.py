"""What an evaluation keeps of its images: moments, gathered features, sums of class probabilities.

All three take images batch by batch, in any order, and merge: parts counted by several processes, or before and after
an interruption, give the same numbers as one pass (to rounding, below 1e-8 relative).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.errors import UserError

Indices = Sequence[int] | range | Tensor
"""Numbers of images within an evaluation, one for each row of a batch."""


class Moments:
    """Count, mean and covariance of features (B, width), in fp64.

    Batches join by the update of Chan, Golub and LeVeque (1979), which keeps sums of squares about the mean: large
    means cost no digits.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (width, width): divided by count - 1. Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"got {self.count} image(s), expected at least 2 for a covariance; evaluate more images")
        return self.scatter / (self.count - 1)

    def add(self, features: Tensor) -> None:
        """Count features (B, width). Raises UserError if some are not finite."""
        x = finite(features).to("cpu", torch.float64)
        mean = x.mean(0)
        x = x - mean
        self._join(len(x), mean, x.T @ x)

    def merge(self, other: Moments) -> None:
        """Count what `other` has counted."""
        self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if mean.shape != self.mean.shape:
            raise ValueError(f"features {len(mean)} wide, expected {self.width}")
        if count:
            total, delta = self.count + count, mean - self.mean
            self.scatter += scatter
            self.scatter += torch.outer(delta, delta * (self.count * count / total))
            self.mean = self.mean + delta * (count / total)
            self.count = total

    def to_arrays(self) -> dict[str, Tensor]:
        """The state as tensors, to be saved or sent; `from_arrays` is the inverse."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Self:
        made = cls(len(arrays["mean"]))
        made.count, made.mean, made.scatter = int(arrays["count"]), arrays["mean"].clone(), arrays["scatter"].clone()
        return made


class Gathered:
    """Features of `count` images, fp32, each in the row of its number: 50,000 x 2048 are 0.38 GiB, and no more.

    The order in which images come does not matter, since rows are numbered.
    """

    def __init__(self, count: int, width: int) -> None:
        self._rows = torch.empty(count, width)  # the system gives the memory when a row is written
        self._here = torch.zeros(count, dtype=torch.bool)

    def __len__(self) -> int:
        return int(self._here.sum())

    @property
    def features(self) -> Tensor:
        """The rows that are here (n, width), by number; a view of the memory unless some are missing."""
        return self._rows if bool(self._here.all()) else self._rows[self._here]

    def add(self, index: Indices, features: Tensor) -> None:
        """Keep features (B, width) of the images `index`. Raises UserError if some are not finite."""
        rows = torch.as_tensor(index)
        self._rows[rows] = finite(features, rows).to("cpu", torch.float32)
        self._here[rows] = True

    def merge(self, other: Gathered) -> None:
        """Keep what `other` has kept, by the same numbers."""
        rows = other._here.nonzero()[:, 0]
        for part in rows.split(4096):
            self._rows[part] = other._rows[part]
        self._here[rows] = True

    def to_arrays(self) -> dict[str, Tensor]:
        """The state as tensors, to be saved or sent; `from_arrays` is the inverse."""
        return {"here": self._here, "features": self.features}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Self:
        made = cls(len(arrays["here"]), arrays["features"].shape[1])
        made._here = arrays["here"].clone()
        made._rows[made._here] = arrays["features"]
        return made


class Marginals:
    """Sums of class probabilities, in fp64, for the Inception Score of `count` images in `splits` parts.

    Which part an image counts in is a random function of its number, so that images sorted by class score the same.
    """

    def __init__(self, count: int, classes: int, splits: int = 10) -> None:
        if count < splits:
            raise UserError(f"the Inception Score takes at least {splits} images, got {count}; evaluate more images")
        self.counts = torch.zeros(splits, dtype=torch.int64)
        self.sums = torch.zeros(splits, classes, dtype=torch.float64)  # of p(y|x)
        self.entropies = torch.zeros(splits, dtype=torch.float64)  # of the entropy of p(y|x)
        shuffled = torch.randperm(count, generator=rng.generator("inception score", count))
        self._split = torch.empty_like(shuffled)
        self._split[shuffled] = torch.arange(count) * splits // count

    def add(self, index: Indices, logits: Tensor) -> None:
        """Count logits (B, classes) of the images `index`. Raises UserError if some are not finite."""
        rows = torch.as_tensor(index)
        p = finite(logits, rows).to("cpu", torch.float64).softmax(1)
        part = self._split[rows]
        self.counts += torch.bincount(part, minlength=len(self.counts))
        self.sums.index_add_(0, part, p)
        self.entropies.index_add_(0, part, torch.special.entr(p).sum(1))

    def merge(self, other: Marginals) -> None:
        """Count what `other` has counted."""
        self.counts += other.counts
        self.sums += other.sums
        self.entropies += other.entropies

    def to_arrays(self) -> dict[str, Tensor]:
        """The state as tensors, to be saved or sent; `from_arrays` is the inverse."""
        images = torch.tensor(len(self._split))
        return {"images": images, "counts": self.counts, "sums": self.sums, "entropies": self.entropies}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Self:
        splits, classes = arrays["sums"].shape
        made = cls(int(arrays["images"]), classes, splits)
        made.counts, made.sums = arrays["counts"].clone(), arrays["sums"].clone()
        made.entropies = arrays["entropies"].clone()
        return made


def finite(features: Tensor, index: Tensor | None = None) -> Tensor:
    """The features (B, width) themselves. Raises UserError, naming the first image `index`, if some are not finite."""
    bad = (~features.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        which = "" if index is None else f", the first is image {int(index[bad[0]])}"
        raise UserError(
            f"features of {len(bad)} of {len(features)} images hold NaN or infinity{which}; look at these images, "
            "or compute their features in float32"
        )
    return features
