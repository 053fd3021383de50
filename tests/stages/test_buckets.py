"""Training with buckets: every batch has one shape, a run resumes to the same bytes, and its model grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pixelgrow
from pixelgrow.data import Batch
from pixelgrow.data.buckets import Shapes
from pixelgrow.errors import UserError
from pixelgrow.models.layers import box_down
from pixelgrow.pictures import GAP
from pixelgrow.recipe.read import read_recipe
from pixelgrow.run import run
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.objective import Terms
from processes import run_team
from runs import WEIGHTS, few_samples, record, stopped_after

SIZES = [(40, 40)] * 9 + [(32, 64)] * 8 + [(80, 44)] * 7  # (h, w)
AT_16 = {(16, 16), (10, 24), (20, 12)}  # their buckets
SHORT: dict[str, Any] = {"batch": 8, "accumulate": 2, "save_every": 8, "log_every": 8, "sample_every": 0}
SHORT |= {"validate_every": 0, "snapshot_every": 0}


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of three shapes."""
    root, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for i, (h, w) in enumerate(SIZES * 2):
        path = root / ("dark" if i % 2 else "light") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (h // 4, w // 4, 3)).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def recipe_of(images: Path, buckets: bool = True, **more: Any) -> dict[str, Any]:
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "stride": 2, "images": 32} | SHORT | more},
        {"grow": {"name": "grown", "to": 32, "images": 16} | SHORT | more},
    ]
    data = {"source": str(images), "buckets": buckets}
    return {"name": "b", "text": {"classes": 2}, "data": data, "stages": stages}


def go(raw: dict[str, Any], root: Path) -> Path:
    run(read_recipe(raw, "test"), root)
    return root / raw["name"]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Size]]:
    """A run that nothing disturbs, and the shapes of its micro-batches."""
    shapes: list[torch.Size] = []
    real = DenoiseObjective.loss

    def loss(self: DenoiseObjective, batch: Batch, part: str = "denoiser") -> Terms:
        shapes.append(batch.image.shape)
        return real(self, batch, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoiseObjective, "loss", loss)
        folder = go(recipe_of(images, validate_every=32, sample_every=32), tmp_path_factory.mktemp("whole"))
    return folder, [shape for shape in shapes if shape[0] == 4]  # those of two count FLOPs


def test_the_batch_of_a_step_has_one_shape(whole: tuple[Path, list[torch.Size]]) -> None:
    shapes = [tuple(shape[2:]) for shape in whole[1]]
    assert shapes[::2] == shapes[1::2]
    assert set(shapes[:8]) == AT_16 and set(shapes[8:]) <= {(2 * h, 2 * w) for h, w in AT_16}


def test_a_stage_says_what_is_in_its_buckets(whole: tuple[Path, list[torch.Size]]) -> None:
    for stage, factor in (("core", 1), ("grown", 2)):
        (sees,) = record(whole[0] / stage)["sees"]
        assert sees["seen"] == 32 and {why: n for why, n in sees["others"].items() if n} == {"held out": 16}
        assert set(sees["buckets"]) == {f"{factor * h}x{factor * w}" for h, w in AT_16}
        assert sum(count for count, _ in sees["buckets"].values()) == 32
    assert "; 3 shapes, " in (whole[0] / "report.html").read_text(encoding="utf-8")


def test_held_out_error_and_grids_are_of_all_shapes(whole: tuple[Path, list[torch.Size]]) -> None:
    lines = [json.loads(line) for line in (whole[0] / "grown" / "log.jsonl").read_text().splitlines()]
    assert any("validation/mean" in line for line in lines)
    growth = json.loads((whole[0] / "grown" / "growth.json").read_text())
    assert growth["before"] == pytest.approx(growth["after"], abs=1e-6)
    with Image.open(whole[0] / "core" / "samples" / f"{32:09d}.png") as grid:
        sheet = np.asarray(grid)
    assert sheet.shape[:2] == (3 * (20 + GAP) - GAP, 4 * (24 + GAP) - GAP)  # each cell is as high and wide as any
    white = [(sheet[at : at + 20] == 255).all(axis=(0, 2)).reshape(-1) for at in range(0, 66, 22)]
    assert all(row.sum() > 3 * GAP for row in white)  # beside the taller ones


def test_a_run_that_is_stopped_anywhere_ends_with_the_same_bytes(
    whole: tuple[Path, list[torch.Size]], images: Path, tmp_path: Path
) -> None:
    for images_seen in (24, 8):  # of the core; of the growth
        with stopped_after(images_seen):
            go(recipe_of(images), tmp_path)
    assert record(tmp_path / "b" / "core")["done"] and not record(tmp_path / "b" / "grown").get("done")
    with pytest.raises(UserError, match=r"the ground, fit or buckets of .* changed since it was begun"):
        go(recipe_of(images, buckets=False), tmp_path)
    go(recipe_of(images), tmp_path)
    for stage in ("core", "grown"):
        assert (tmp_path / "b" / stage / WEIGHTS).read_bytes() == (whole[0] / stage / WEIGHTS).read_bytes()


def test_two_processes_train_as_one(whole: tuple[Path, list[torch.Size]], images: Path, tmp_path: Path) -> None:
    raw = recipe_of(images)
    path = tmp_path / "b.yaml"
    path.write_text(json.dumps(raw | {"stages": raw["stages"][:1]}), encoding="utf-8")
    ended = run_team(tmp_path / "said", "run", path, "--runs", tmp_path)
    assert [result.code for result in ended] == [0, 0], ended
    assert (tmp_path / "b" / "core" / WEIGHTS).read_bytes() == (whole[0] / "core" / WEIGHTS).read_bytes()


def test_a_grown_model_samples_at_every_size_of_its_buckets(whole: tuple[Path, list[torch.Size]]) -> None:
    model = pixelgrow.load(whole[0] / "grown", device="cpu")
    shapes = Shapes((32, 32), model.denoiser.net.config.stride)
    assert {(2 * h, 2 * w) for h, w in AT_16} < set(shapes.sizes)
    for size in (shapes.sizes[0], shapes.sizes[-1], (20, 48)):
        settings: dict[str, Any] = {"size": size, "steps": 3, "seed": 5}
        image, small = (take(["dark"], **settings)[0] for take in (model.sample, model.preview))
        assert (image.height, image.width) == size and (small.height, small.width) == (size[0] // 2, size[1] // 2)
        whole_image = torch.from_numpy(np.array(image)).double().permute(2, 0, 1)
        assert (box_down(whole_image, 2) - torch.from_numpy(np.array(small)).permute(2, 0, 1)).abs().max() <= 1.5


MESSAGES = {
    "pairs are squares: give the stage data: of its own, the same without buckets": {
        "stages": [
            {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "batch": 8}},
            {"pairs": {"name": "pairs", "n": 8}},
        ]
    },
    "buckets: got true with latent:, which encodes squares; drop one of the two": {"latent": "somewhere"},
    "buckets: got true with fit: pad, which makes every image a square; drop one of the two": {
        "data": {"source": "there", "buckets": True, "fit": "pad"}
    },
    "buckets: got True, but it belongs to a path, not to scenes; drop it": {
        "data": {"source": "scenes", "buckets": True}
    },
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_has_no_buckets_is_refused_in_one_line(message: str) -> None:
    raw = recipe_of(Path("there")) | MESSAGES[message]
    with pytest.raises(UserError) as caught:
        read_recipe(raw, "test")
    assert str(caught.value).endswith(message) and "\n" not in str(caught.value)
