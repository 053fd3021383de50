"""Of many captions' real images, is the nearest to a generated image its own caption's? Needs no text model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.results import Judged, Summary, summarise

TOPS = (1, 5)
TIE = 1e-6  # cosines closer than this are equal: features are float32
ROWS = 1024  # generated images compared at once


@dataclass(frozen=True)
class Retrieval:
    """judged: of each generated image, `top-1` and `top-5`. chance: what images of other captions would score."""

    judged: list[Judged]
    chance: dict[str, float]
    candidates: int

    def summary(self) -> Summary:
        """Means over captions with intervals."""
        return summarise(self.judged)

    def to_json(self) -> dict[str, Any]:
        """The summary with chance, as JSON."""
        return self.summary().to_json() | {"chance": self.chance, "candidates": self.candidates}


def retrieval(generated: Tensor, real: Tensor, captions: Sequence[str], own: Sequence[str] | None = None) -> Retrieval:
    """Rank K real images by the cosine of their features with a generated image's.

    generated: features (N, C) of generated images. real: features (K, C) of one real image a caption. captions: the
    real images' K captions. own: the generated images' N captions, each one of `captions`; `captions` itself, if not
    given.

    `top-k` of a generated image is the probability that a real image of its caption is among the first k of the
    ranking, where equal cosines are put in random order: an image that is as near as t others does not win. So constant
    features score chance. If several real images have the same caption, each is its own. A `top-k` with k >= K says
    nothing and is left out.

    Raises UserError if the numbers or widths do not fit, features are not finite, or fewer than 2 captions differ.
    """
    wanted = list(captions if own is None else own)
    _check(generated, real, captions, wanted)
    tops = [k for k in TOPS if k < len(real)]
    places: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        places.setdefault(caption, []).append(i)
    targets = F.normalize(real.double(), dim=1)
    judged: list[Judged] = []
    chances = dict.fromkeys(tops, 0.0)
    for start in range(0, len(generated), ROWS):
        cosines = F.normalize(generated[start : start + ROWS].double(), dim=1) @ targets.T
        for row, caption in zip(cosines, wanted[start : start + ROWS], strict=True):
            mine = torch.zeros(len(row), dtype=torch.bool)
            mine[places[caption]] = True
            best = row[mine].max()
            nearer = int((row > best + TIE).sum())
            equal = (row - best).abs() <= TIE
            tied, tied_mine = int(equal.sum()), int((equal & mine).sum())
            scores = {f"top-{k}": _hit(k - nearer, tied, tied_mine) for k in tops}
            judged.append(Judged(caption, caption, scores))
            for k in tops:
                chances[k] += _hit(k, len(row), int(mine.sum())) / len(wanted)
    return Retrieval(judged, {f"top-{k}": chance for k, chance in chances.items()}, len(real))


def _hit(places: int, tied: int, mine: int) -> float:
    """The probability that one of `mine` among `tied` images in random order comes on one of the first places."""
    if places <= 0:
        return 0.0
    return 1.0 if places >= tied else 1 - comb(tied - mine, places) / comb(tied, places)


def _check(generated: Tensor, real: Tensor, captions: Sequence[str], wanted: Sequence[str]) -> None:
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise UserError(
            f"retrieval: got features {tuple(generated.shape)} of generated and {tuple(real.shape)} of real images; "
            "expected (N, C) and (K, C); take both from one extractor"
        )
    if len(real) != len(captions) or len(generated) != len(wanted):
        raise UserError(
            f"retrieval: got {len(generated)} generated and {len(real)} real images for {len(wanted)} and "
            f"{len(captions)} captions; expected one caption an image"
        )
    if len(set(captions)) < 2 or not len(generated):
        raise UserError(
            f"retrieval: got {len(generated)} generated images and {len(set(captions))} different captions of real "
            "ones; expected at least 1 and 2; take more held-out captions"
        )
    known = set(captions)
    if strange := next((c for c in wanted if c not in known), None):
        raise UserError(f"retrieval: no real image has the caption {strange!r}; expected captions of the real images")
    for name, features in (("generated", generated), ("real", real)):
        bad = (~torch.isfinite(features).all(1)).nonzero().flatten()
        if len(bad):
            raise UserError(
                f"retrieval: features of {len(bad)} {name} images, the first of them {int(bad[0])}, are not finite; "
                "expected numbers; check the images"
            )
