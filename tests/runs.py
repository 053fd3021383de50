"""What tests of runs share: small data, small sample grids, and runs that stop on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixelgrow.recipe.read import FOLDER, Recipe, read_recipe
from pixelgrow.stages import distill, grow, looks, train
from pixelgrow.training.saving import Saver

WEIGHTS = "checkpoint/model.safetensors"


@contextmanager
def few_samples() -> Iterator[None]:
    """Few images and steps for sample grids and held-out errors: no test here depends on how well a model trains."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GRID": 4, "KNOWN": 3, "GRID_STEPS": 2}.items():
            patch.setattr(looks, name, value)
        for stages in (train, grow, distill):
            patch.setattr(stages, "WATCHED", 8)
        yield


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


def own_files(folder: Path) -> set[str]:
    """Names in a run's folder that are not of stages."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names - {path.parent.name for path in folder.glob("*/stage.json")}


class Stop(Exception):
    pass


@contextmanager
def stopped_after(images: int) -> Iterator[None]:
    """The run stops when it has saved its state at so many images."""
    real = Saver.start

    def start(self: Saver, now: int, *rest: Any) -> None:
        real(self, now, *rest)
        if now == images:
            self.finish()
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Saver, "start", start)
        yield


def only_core(folder: Path) -> Path:
    """The smoke recipe with its core alone."""
    text = (FOLDER / "smoke.yaml").read_text()
    path = folder / "smoke.yaml"
    path.write_text(text[: text.index("  - grow")])
    return path


def class_images(root: Path) -> Path:
    """A folder of two classes with twelve images each."""
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        folder = root / "images" / label
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 100, (64, 64, 3)) + (150 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root / "images"


def class_recipe(folder: Path, text: dict[str, Any], **more: Any) -> Recipe:
    stage = {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "batch": 8} | more}
    return read_recipe(
        {"name": "c", "text": text, "data": {"source": str(class_images(folder))}, "stages": [stage]}, "test"
    )
