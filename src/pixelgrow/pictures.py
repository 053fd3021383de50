"""From tensors to 8-bit images, alone or many in a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 2  # white pixels between the images of a grid
ELONGATED = 4  # columns to rows, or rows to columns, from which on a grid is no longer pleasant to look at


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1], what is outside cut off -> (N, H, W, 3) of uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def columns_of(prompts: int, each: int) -> int:
    """Columns of a grid of `each` images of each of several prompts: a row for each prompt unless that is a strip.

    Otherwise nearly square, where possible with every prompt at the start of a row or a row of whole prompts.
    """
    count = prompts * each
    square = math.ceil(math.sqrt(count))
    if prompts == 1 or each == 1:
        return square
    whole = [c for c in range(1, count + 1) if each % c == 0 or c % each == 0]
    for columns in (each, min(reversed(whole), key=lambda c: abs(math.log(c * c / count)))):
        rows = math.ceil(count / columns)
        if max(columns, rows) <= ELONGATED * min(columns, rows):
            return columns
    return square


def grid_size(size: tuple[int, int], columns: int, count: int) -> tuple[int, int]:
    """(h, w) of a grid of `count` images of `size` (h, w)."""
    rows = math.ceil(count / columns)
    return rows * (size[0] + GAP) - GAP, min(columns, count) * (size[1] + GAP) - GAP


def grid(images: Iterable[np.ndarray], columns: int, count: int) -> Image.Image:
    """One image of `count` >= 1 images (H, W, 3) of uint8 and of one size, row by row. They may come one at a time."""
    rest = iter(images)
    first = next(rest)
    h, w, _ = first.shape
    sheet = np.full((*grid_size((h, w), columns, count), 3), 255, np.uint8)
    for i, image in enumerate(chain([first], rest)):
        top, left = i // columns * (h + GAP), i % columns * (w + GAP)
        sheet[top : top + h, left : left + w] = image
    return Image.fromarray(sheet)
