"""The measurements of emoji models, on pictures whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from pixelgrow.evaluation.features import Features

ROOT = Path(__file__).parents[2]
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250), (250, 20, 250)]


class Colour:
    """Mean colour as a feature."""

    name, width, identity = "colour", 3, ""

    def describe(self) -> dict[str, object]:
        return {}

    def __call__(self, images: Tensor) -> Features:
        return Features(images.float().mean((2, 3)), None)


@pytest.fixture(autouse=True)
def _benches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def folder_of(path: Path, style: str, sides: int) -> Path:
    path.mkdir()
    rows = []
    for number, colour in enumerate(COLOURS):
        for ground in ("white", "red"):
            name = f"{style}-{number}-{ground}.png"
            Image.new("RGB", (sides, sides), colour).save(path / name)
            rows.append(
                {"file_name": name, "concept": str(number), "style": style, "ground": ground, "text": ["a", "b"]}
            )
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pictures_are_those_on_white_averaged_down(tmp_path: Path) -> None:
    from bench.emoji import pictures

    found = pictures(folder_of(tmp_path / "train", "fluent", 16))
    assert [(p.concept, p.style, p.text) for p in found] == [(str(i), "fluent", "a") for i in range(6)]
    assert (found[0].image(8) == np.full((8, 8, 3), COLOURS[0], np.uint8)).all()
    assert found[0].image(32).shape == (16, 16, 3)  # nothing is enlarged


def test_held_out_pairs_are_found_among_pictures_of_their_style(tmp_path: Path) -> None:
    from bench.emoji import held_out, hits, pictures

    noto, fluent = (pictures(folder_of(tmp_path / s, s, 16)) for s in ("noto", "fluent"))
    test, train = [noto[0], fluent[1], noto[2]], [*noto[3:], *fluent[2:]]
    right = [p.image(8) for p in test]
    found = held_out(Colour(), right, test, train, 8, 4)
    assert {style: (len(r.judged), r.candidates) for style, r in found.items()} == {"noto": (2, 4), "fluent": (1, 4)}
    assert hits(found, "top-1") == [1.0, 1.0, 1.0]
    wrong = held_out(Colour(), [right[2], train[4].image(8), right[0]], test, train, 8, 4)
    assert hits(wrong, "top-1") == [0.0, 0.0, 0.0]


def test_features_are_of_pictures_of_any_size() -> None:
    from bench.emoji import features

    images = [np.full((side, side, 3), side, np.uint8) for side in (64, 72)]
    assert features(Colour(), images).tolist() == [[64] * 3, [72] * 3]


def test_the_top_octave_sees_fine_structure_alone() -> None:
    from bench.emoji import top_octave

    x = np.tile(np.arange(32), (32, 1))
    stripes = {period: (127 + 64 * np.cos(2 * np.pi * x / period))[..., None].repeat(3, 2) for period in (3.2, 8)}
    assert top_octave([stripes[3.2]]) == pytest.approx(64**2 / 2)  # the power of a cosine
    assert top_octave([stripes[8]]) == pytest.approx(0, abs=1e-9)
    assert top_octave([stripes[3.2], stripes[8]]) == pytest.approx(64**2 / 4)


def test_seams_are_the_worst_of_the_patches() -> None:
    from bench.emoji import seams

    blocks = np.kron(np.random.default_rng(0).integers(0, 255, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    assert seams([blocks], [4]) > 100
    assert seams([blocks], [2, 4]) == seams([blocks], [4])
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert seams([noise], [2, 4]) == pytest.approx(1, abs=0.1)


def test_upscaled_pictures_are_compared_with_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.emoji as bench

    def lighter(_: object, images: list[np.ndarray], texts: list[str]) -> list[np.ndarray]:
        assert len(images) == len(texts) and images[0].shape == (8, 8, 3)
        return [image.repeat(2, 0).repeat(2, 1) + 3 for image in images]

    monkeypatch.setattr(bench, "upscale", lighter)
    monkeypatch.setattr(bench, "top_octave", len)  # these pictures have none
    wanted = bench.pictures(folder_of(tmp_path / "train", "fluent", 16))
    images, found = bench.upscaled(SimpleNamespace(resolution=16), Colour(), wanted, 8)
    assert len(images) == len(wanted)
    assert found["upscaled: error"] == pytest.approx(3) and found["bicubic: error"] == 0
    assert found["upscaled: distance of features"] == pytest.approx(27) and found["bicubic: distance of features"] == 0
