"""Real images and their captions: which, in what order, at what size."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_files import noisy_classes
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.errors import UserError
from pixelgrow.evaluation.real import digest, open_real, open_train


def captioned(folder: Path, count: int, side: int = 24) -> Path:
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": f"image {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scenes_are_held_out_and_a_number_means_one_scene() -> None:
    few, many = open_real("scenes", (32, 32), 3), open_real("scenes", (32, 32), 5)
    assert len(few) == 3 and list(many.prompts[:3]) == list(few.prompts)
    assert few.describe() == many.describe() and few.captioned
    source = few.items[0][0]
    assert isinstance(source, Scenes) and source.split == "heldout"
    images, kept, bad = few.images(range(3))
    assert images.equal(many.images(range(5))[0][:3]) and (kept, bad) == ([0, 1, 2], [])
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), source.scene(1).render(32, 32))
    train = open_train("scenes", (32, 32), 3).items[0][0]
    assert isinstance(train, Scenes) and train.split == "train"


def test_a_folder_is_shuffled_and_the_first_images_stay_the_first(tmp_path: Path) -> None:
    folder = str(captioned(tmp_path / "data", 12))
    few, many = open_real(folder, (16, 16), 4), open_real(folder, (16, 16), 100)
    assert len(many) == 12 and list(many.prompts[:4]) == list(few.prompts) != [f"image {i}" for i in range(4)]
    assert few.captioned and few.images([0])[0].shape == (1, 3, 16, 16)
    assert digest(few.prompts) != digest(many.prompts)


def test_small_images_are_left_out_and_damaged_ones_named(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "data", 6)
    Image.new("RGB", (8, 8)).save(folder / "03.png")
    real = open_real(str(folder), (20, 20), 10)
    assert len(real) == 5 and "image 3" not in real.prompts
    whole = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(whole[: len(whole) // 2])
    real = open_real(str(folder), (20, 20), 10)
    images, kept, bad = real.images(range(5))
    at = list(real.prompts).index("image 5")
    assert kept == [i for i in range(5) if i != at] and len(images) == 4
    assert len(bad) == 1 and bad[0].startswith("05.png: ")
    with pytest.raises(UserError, match="got 6 images, none of 64x64 or larger"):
        open_real(str(folder), (64, 64), 10)


def test_images_without_captions_do_where_no_prompts_are_needed(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError):
        open_real(str(tmp_path), (16, 16), 3)
    real = open_real(str(tmp_path), (16, 16), 3, captions=False)
    assert not real.captioned and len(real) == 3
    assert real.images([])[0].shape == (0, 3, 16, 16)
    assert sorted(real.images(range(3))[0][:, 0, 0, 0].tolist()) == [0, 1, 2]
    assert torch.equal(open_train(str(tmp_path), (16, 16), 3).images(range(3))[0], real.images(range(3))[0])


def test_tar_shards(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "data", 3)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for i in range(3):
            (folder / f"{i:02d}.txt").write_text(f"caption {i}")
            for end in ("png", "txt"):
                tar.add(folder / f"{i:02d}.{end}", f"{i:02d}.{end}")
    real = open_real(str(tmp_path / "data.tar"), (16, 16), 3)
    assert sorted(real.prompts) == [f"caption {i}" for i in range(3)] and len(real.images(range(3))[0]) == 3


def test_class_folders_have_labels(tmp_path: Path) -> None:
    real = open_real(str(noisy_classes(tmp_path)), (16, 16), 30)
    assert (real.classes, set(real.prompts), real.captioned) == (("a", "b", "c"), {"0", "1", "2"}, False)
