"""From 8-bit images to tensors and back, single or in a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # white pixels between the images of a grid
LABEL = 11  # pixels of a number below an image
ELONGATED = 4  # the largest ratio of columns to rows, or of rows to columns, of a grid


def to_float(images: Tensor) -> Tensor:
    """Images of any shape, uint8 -> float32 in [-1, 1]. Of another type they are in [-1, 1] already, or latents."""
    if images.dtype != torch.uint8:
        return images.float()
    # One allocation instead of three: new memory takes longer than the arithmetic.
    made = torch.empty_like(images, dtype=torch.float32, memory_format=torch.contiguous_format)
    return made.copy_(images).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W), clamped to [-1, 1] -> (N, H, W, 3) uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) uint8 -> an image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def columns_of(prompts: int, each: int) -> int:
    """Columns of a grid of `each` images of each of several prompts: one row per prompt if that is not too elongated.

    Otherwise nearly square: if possible each prompt begins a row, or each row holds all images of its prompts.
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


def in_groups(sizes: Sequence[tuple[int, int]], make: Callable[[list[int], tuple[int, int]], Tensor]) -> list[Tensor]:
    """The images of all `sizes`, in order, made in groups of one size: `make(rows, size)` makes those of some rows,
    (n, C, h, w)."""
    found: dict[int, Tensor] = {}
    for size in dict.fromkeys(sizes):
        rows = [row for row, one in enumerate(sizes) if one == size]
        found |= zip(rows, make(rows, size), strict=True)
    return [found[row] for row in range(len(sizes))]


def grid_size(size: tuple[int, int], columns: int, count: int) -> tuple[int, int]:
    """(h, w) of a grid of `count` images of `size` (h, w)."""
    rows = math.ceil(count / columns)
    return rows * (size[0] + GAP) - GAP, min(columns, count) * (size[1] + GAP) - GAP


def grid(images: Iterable[np.ndarray], columns: int, count: int, *, numbered: bool = False) -> Image.Image:
    """One image of `count` >= 1 images (H, W, 3) uint8 of one size, row by row. `images` may be a generator.

    `numbered`: with each image's number, from 0, below it.
    """
    rest = iter(images)
    first = next(rest)
    h, w, _ = first.shape
    cell = h + (LABEL if numbered else 0)
    sheet = np.full((*grid_size((cell, w), columns, count), 3), 255, np.uint8)
    for i, image in enumerate(chain([first], rest)):
        top, left = i // columns * (cell + GAP), i % columns * (w + GAP)
        sheet[top : top + h, left : left + w] = image
    made = Image.fromarray(sheet)
    if numbered:
        draw, font = ImageDraw.Draw(made), ImageFont.load_default(LABEL - 1)
        for i in range(count):
            place = (i % columns * (w + GAP) + w / 2, i // columns * (cell + GAP) + h)
            draw.text(place, str(i), fill="black", font=font, anchor="ma")
    return made
