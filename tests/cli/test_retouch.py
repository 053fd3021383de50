"""What the `edit` verbs read: images and masks through the decoder of the data, by content."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgrow.cli.retouch import _mask, _read
from pixelgrow.errors import UserError

HALF = np.zeros((20, 30), np.uint8)
HALF[:, 15:] = 255


@pytest.mark.parametrize(
    "name", ["mask.png", "mask.jpg", "mask.gif", "MASK.PNG", "mask", unicodedata.normalize("NFD", "é.png")]
)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_mask_is_known_by_its_bytes(name: str, mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(HALF.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(HALF).convert(mode)
    image.save(tmp_path / name, "PNG")
    assert np.array_equal(_mask(tmp_path / name, np.zeros((20, 30, 3), np.uint8)), HALF > 0)


def test_an_image_turns_with_its_exif_as_in_the_data(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(HALF).save(tmp_path / "a.png", exif=exif.tobytes())
    assert _read(tmp_path / "a.png").shape == (30, 20, 3)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    Image.fromarray(HALF).save(tmp_path / "a.png", "GIF")
    with pytest.raises(UserError, match=r"a\.png cannot be used \(a GIF file, not a JPEG, PNG or WebP image\)"):
        _read(tmp_path / "a.png")
