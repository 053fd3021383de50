"""Small data that tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def class_folder(root: Path) -> Path:
    folder = root / "images"
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        pixels = np.full((32, 32, 3), 80 * label, np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / "a.png")
    return folder
