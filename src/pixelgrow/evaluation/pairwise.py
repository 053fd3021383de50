"""Inner products and distances of all pairs of two sets of features, block by block, in fp64.

Features stay fp32 where they lie; a block of 2048 x 2048 pairs and two of 2048 rows are all that is fp64, about 0.1 GiB
at a width of 2048.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2048
_SAME = 1e-12  # squared distances below this part of the squared lengths are rounding: the rows are the same


def products(x: Tensor, y: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of x (n, width) and of y (m, width), and the inner products of these rows: every pair once.

    Without y, the pairs are of x with itself, and of two blocks that mirror each other only the upper one comes.
    """
    other = x if y is None else y
    for i in range(0, len(x), BLOCK):
        left = x[i : i + BLOCK].double()
        for j in range(i if y is None else 0, len(other), BLOCK):
            right = other[j : j + BLOCK].double()
            yield slice(i, i + len(left)), slice(j, j + len(right)), left @ right.T


def squared_lengths(x: Tensor) -> Tensor:
    """Squared Euclidean lengths (n,) of the rows, fp64."""
    return torch.cat([part.double().square().sum(1) for part in x.split(BLOCK)])


def squared_distances(x: Tensor, y: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """As `products`, of squared Euclidean distances. Rows that are the same are exactly 0 apart."""
    xx = squared_lengths(x)
    yy = xx if y is None else squared_lengths(y)
    for i, j, block in products(x, y):
        size = xx[i, None] + yy[None, j]
        block.mul_(-2).add_(size)
        yield i, j, block.masked_fill_(block <= size.mul_(_SAME), 0.0)
