"""Precision, recall, density and coverage: which images lie near which, in an extractor's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.pairwise import squared_distances


@dataclass(frozen=True)
class Neighbours:
    """Shares of images (density may exceed 1). A ball reaches from an image to its k-th neighbour in its own set.

    precision   generated images in the ball of some real image
    recall      real images in the ball of some generated image
    density     real images' balls that a generated image lies in, on average, divided by k
    coverage    real images with a generated image in their ball
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, generated: Tensor, *, manifold: int = 3, ball: int = 5) -> Neighbours:
    """Compare features real (n, width) and generated (m, width).

    manifold    k of precision and recall (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2)
    ball        k of density and coverage (Naeem et al., arXiv 2002.09797, eq. 3 and 4)

    A ball contains its border, as in the first paper: with k copies of an image its ball has radius 0 and holds only
    itself. Costs two times n m inner products in fp64. Raises UserError for fewer images than neighbours.
    """
    k = max(manifold, ball)
    for name, x in (("real", real), ("generated", generated)):
        if len(x) <= k:
            raise UserError(
                f"precision, recall, density and coverage look at {k} neighbours: got {len(x)} {name} image(s), "
                f"expected at least {k + 1}; evaluate more images"
            )
    near = _nearest(real, k)
    real_manifold, real_ball = near[:, manifold], near[:, ball]
    generated_manifold = _nearest(generated, manifold)[:, manifold]
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    inside = 0
    for i, j, block in squared_distances(real, generated):
        precise[j] |= (block <= real_manifold[i, None]).any(0)
        recalled[i] |= (block <= generated_manifold[None, j]).any(1)
        within = block <= real_ball[i, None]
        covered[i] |= within.any(1)
        inside += int(within.sum())
    return Neighbours(
        precision=precise.double().mean().item(),
        recall=recalled.double().mean().item(),
        density=inside / (ball * len(generated)),
        coverage=covered.double().mean().item(),
    )


def _nearest(x: Tensor, k: int) -> Tensor:
    """Squared distances (n, k + 1) of each row to its nearest rows, ascending; the first is 0, to itself."""
    best = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64)
    for i, j, block in squared_distances(x):
        best[i] = torch.cat([best[i], block], 1).topk(k + 1, largest=False).values
        if i != j:
            best[j] = torch.cat([best[j], block.T], 1).topk(k + 1, largest=False).values
    return best
