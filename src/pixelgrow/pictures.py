"""From tensors to 8-bit pictures, alone or many in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

GAP = 2  # white pixels between the pictures of a grid


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1], what is outside cut off -> (N, H, W, 3) of uint8."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures: Sequence[np.ndarray] | np.ndarray, columns: int) -> Image.Image:
    """One picture of one or more (H, W, 3) of uint8 and of one size, row by row."""
    h, w, _ = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (h + GAP), i % columns * (w + GAP)
        sheet[top : top + h, left : left + w] = picture
    return Image.fromarray(sheet)
