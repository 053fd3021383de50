"""The `sample` verb: grids, single files and their metadata."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import RunCli
from pixelgrow import checkpoint
from pixelgrow.cli.sample import typed


def test_sample_writes_a_grid_with_its_settings(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1\n\n2\n")
    words = ["sample", str(model), "0", "--prompts", "prompts.txt", "-n", "2", "--steps", "2", "--seed", "3"]
    result = run_cli(*words, "-o", "out/grid.png", cwd=tmp_path)
    assert result.out.strip() == "out/grid.png"
    image = Image.open(tmp_path / "out/grid.png")
    assert image.size == (2 * 16 + 2, 3 * 16 + 4)
    facts = json.loads(image.text["pixelgrow"])  # type: ignore[attr-defined]
    assert facts["prompts"] == ["0", "0", "1", "1", "2", "2"]
    assert (facts["seed"], facts["steps"], facts["guidance"]) == (3, 2, 2.0)
    assert facts["sha256"] == checkpoint.read_config(model).sha256


def test_a_byte_order_mark_is_no_prompt(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf1\n")
    assert run_cli("sample", model, "--prompts", "prompts.txt", "--steps", "1", "-o", "o", cwd=tmp_path).code == 0
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["0000-1.png"]


def test_a_prompt_is_what_was_typed_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a locale of latin-1 decodes a command line: UTF-8 is read as such, and else the locale is believed."""
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("latin-1"))
    for word in ("été", "猫"):
        assert typed(word.encode("utf-8").decode("latin-1")) == word
    assert typed("été") == "été"


def test_sample_writes_single_files_that_the_grid_holds(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    words = ["sample", str(model), "0", "1", "--steps", "2", "--size", "16x24"]
    assert run_cli(*words, "-o", "grid.png", cwd=tmp_path).code == 0
    result = run_cli(*words, "-o", "singles", cwd=tmp_path)
    assert result.out.split() == ["singles/0000-0.png", "singles/0001-1.png"]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    for i, name in enumerate(result.out.split()):
        single = np.asarray(Image.open(tmp_path / name))
        assert single.shape == (16, 24, 3)
        assert (grid[:, 26 * i : 26 * i + 24] == single).all()


def test_single_files_are_written_as_they_are_made(
    model: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(image: Image.Image, path: Path, **settings: Any) -> None:
        save(image, path, **settings)
        if "0003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    words = ["sample", model, "0", "-n", "5", "--steps", "1", "--batch", "2", "-o", "many"]
    result = run_cli(*words, cwd=tmp_path)
    assert (result.code, "cannot write many/0003-0.png: No space left" in result.err) == (2, True)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0000-0.png", "0001-0.png", "0002-0.png"]


def test_many_images_of_one_prompt_are_nearly_square(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("sample", model, "0", "-n", "9", "--steps", "1", cwd=tmp_path).code == 0
    assert np.asarray(Image.open(tmp_path / "samples.png")).shape == (3 * 16 + 4, 3 * 16 + 4, 3)
    ends = ["--seed", "0", "--seed", "1", "--frames", "12", "-o", "arc.png"]
    assert run_cli("edit", "interpolate", model, "--prompt", "0", *ends, "--steps", "1", cwd=tmp_path).code == 0
    assert np.asarray(Image.open(tmp_path / "arc.png")).shape == (3 * 16 + 4, 4 * 16 + 6, 3)


@pytest.mark.parametrize("out", ["FILE/grid.png", "FILE", "folder.png"])
def test_the_place_is_checked_before_images_are_sampled(
    model: Path, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "FILE").write_text("")
    (tmp_path / "folder.png").mkdir()
    sampled: list[object] = []
    monkeypatch.setattr("pixelgrow.model.Model.stream", lambda *_, **__: sampled.append(1))
    result = run_cli("sample", model, "0", "-o", out, cwd=tmp_path)
    assert (result.code, sampled, len(result.err.splitlines())) == (2, [], 1)
    assert out in result.err
