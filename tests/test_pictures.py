"""8-bit images of tensors, and grids of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pixelgrow.pictures import columns_of, grid, grid_size, to_uint8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_clamped_and_rounded(dtype: torch.dtype) -> None:
    values = torch.tensor([-3.0, -1, -0.5, 0, 1, 3], dtype=dtype)
    pixels = to_uint8(values.reshape(2, 1, 1, 3).expand(2, 3, 1, 3))
    assert pixels.shape == (2, 1, 3, 3) and pixels.dtype == np.uint8
    assert pixels[..., 0].ravel().tolist() == [0, 0, 64, 128, 255, 255]


def test_channels_are_last_and_a_grid_goes_row_by_row() -> None:
    images = torch.rand(5, 3, 4, 6) * 2 - 1
    pixels = to_uint8(images)
    assert np.array_equal(pixels[1, 2, 3], to_uint8(images[1:2, :, 2:3, 3:4])[0, 0, 0])
    sheet = np.asarray(grid(iter(pixels), 3, 5))
    assert sheet.shape == (10, 22, 3)
    assert np.array_equal(sheet[:4, 8:14], pixels[1]) and np.array_equal(sheet[6:, 8:14], pixels[4])
    assert (sheet[4:6] == 255).all() and (sheet[:, 6:8] == 255).all() and (sheet[6:, 16:] == 255).all()
    assert np.array_equal(np.asarray(grid(pixels[:2], 8, 2)), sheet[:4, :14])
    assert grid_size((4, 6), 3, 5) == sheet.shape[:2] and grid_size((4, 6), 8, 2) == (4, 14)


@pytest.mark.parametrize(
    ("prompts", "each", "columns"),
    [
        (1, 1, 1), (1, 64, 8), (1, 7, 3), (64, 1, 8), (30_000, 1, 174),  # nearly square
        (3, 2, 2), (4, 16, 16), (8, 8, 8),  # a row for each prompt
        (2, 64, 16), (1000, 2, 44), (30_000, 3, 300),  # whole prompts in a row, or whole rows of a prompt
        (2, 13, 6), (97, 89, 89),
    ],
)  # fmt: skip
def test_a_grid_is_no_strip(prompts: int, each: int, columns: int) -> None:
    assert columns_of(prompts, each) == columns
    rows = -(-prompts * each // columns)
    assert max(rows, columns) <= 4 * min(rows, columns)
