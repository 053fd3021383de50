"""Kernel distances between two sets of features: KID, MMD with KID's kernel, CMMD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.errors import UserError
from pixelgrow.evaluation.pairwise import products, squared_lengths

BLOCK = 1000  # images of KID's blocks
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class BlockEstimate:
    """Mean and standard deviation over blocks."""

    mean: float
    std: float


def kid(real: Tensor, generated: Tensor, *, blocks: int = 100, size: int = BLOCK) -> BlockEstimate:
    """Kernel Inception Distance (Binkowski et al., arXiv 1801.01401): `mmd` of random blocks of images of each set.

    Sets (n, width). Blocks and size are those of torch-fidelity. Which images a block takes is a function of its
    number. Not multiplied by 1000, as in some tables. Raises UserError for fewer images than a block takes.
    """
    if min(len(real), len(generated)) < size:
        raise UserError(
            f"KID takes blocks of {size:,} images: got {len(real):,} real and {len(generated):,} generated; evaluate "
            "more images, or use mmd, which takes all pairs"
        )

    def drawn(x: Tensor, name: str, block: int) -> Tensor:
        return x[torch.randperm(len(x), generator=rng.generator("kid", name, block))[:size]]

    values = [mmd(drawn(real, "real", b), drawn(generated, "generated", b)) for b in range(blocks)]
    found = torch.tensor(values, dtype=torch.float64)
    return BlockEstimate(found.mean().item(), found.std(correction=0).item())


def mmd(real: Tensor, generated: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with KID's kernel.

    The kernel is (x.y / width + 1)^3. All pairs of features (n, width) and (m, width) count, so it may be negative.
    Raises UserError for fewer than two images.
    """
    n, m, width = len(real), len(generated), real.shape[1]
    if min(n, m) < 2:
        raise UserError(f"got {n} real and {m} generated image(s), expected at least 2 of each; evaluate more images")

    def kernel(product: Tensor) -> Tensor:
        return product.div_(width).add_(1).pow_(3)

    def within(x: Tensor) -> float:
        total = sum((1 if i == j else 2) * kernel(block).sum().item() for i, j, block in products(x))
        return (total - kernel(squared_lengths(x)).sum().item()) / (len(x) * (len(x) - 1))

    between = sum(kernel(block).sum().item() for _, _, block in products(real, generated)) / (n * m)
    return within(real) + within(generated) - 2 * between


def cmmd(real: Tensor, generated: Tensor) -> float:
    """CMMD (Jayasumana et al., arXiv 2401.09603) of CLIP's image embeddings (n, width) and (m, width).

    As in the released code: rows of length 1, kernel exp(-d^2 / (2 sigma^2)) with sigma 10, the biased estimate
    (Gretton et al. 2012, eq. 5), times 1000. Raises UserError for a row of zeros.
    """
    x, y = _lengths(real, "real"), _lengths(generated, "generated")

    def mean(pairs: Iterator[tuple[slice, slice, Tensor]], a: Tensor, b: Tensor) -> float:
        total = 0.0
        for i, j, block in pairs:
            cosine = block.div_(a[i, None]).div_(b[None, j])
            # d^2 = 2 - 2 cosine. exp(z) - 1: nearly all of exp(z) is one, and the ones cancel between the three means.
            values = cosine.sub_(1).div_(CMMD_SIGMA**2).expm1_().sum().item()
            total += values if a is not b or i == j else 2 * values
        return total / (len(a) * len(b))

    within = mean(products(real), x, x) + mean(products(generated), y, y)
    return CMMD_SCALE * (within - 2 * mean(products(real, generated), x, y))


def _lengths(x: Tensor, name: str) -> Tensor:
    """Lengths (n,) of the rows, fp64."""
    lengths = squared_lengths(x).sqrt()
    if not bool(lengths.all()):
        row = int((lengths == 0).nonzero()[0, 0])
        raise UserError(f"CMMD compares directions: {name} embedding {row} is all zeros; check the extractor")
    return lengths
