"""`sample --preview`, `--pick` and `--best-of`: thumbnails, numbered; the chosen ones at full size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import RunCli
from exact_models import exact_model

PROMPT = "a red circle above two blue stars"
FEW = ["--steps", "3", "--guidance", "2", "--seed", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exact") / "model"
    exact_model().save_pretrained(made)
    return made


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def sample(run_cli: RunCli, folder: Path, *words: str) -> tuple[int, str]:
    done = run_cli("sample", str(folder), PROMPT, *FEW, *words)
    return done.code, done.out + done.err


def test_a_picked_image_averages_down_to_its_thumbnail(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    status, out = sample(run_cli, folder, "--preview", "-n", "6", "-o", str(tmp_path / "thumbs"))
    assert status == 0, out
    thumbs = sorted((tmp_path / "thumbs").iterdir())
    assert [t.name[:4] for t in thumbs] == [f"{i:04d}" for i in range(6)]
    assert pixels(thumbs[0]).shape == (32, 32, 3)
    assert sample(run_cli, folder, "-n", "6", "--pick", "5,1", "-o", str(tmp_path / "large"))[0] == 0
    large = sorted((tmp_path / "large").iterdir())
    assert [p.name[:4] for p in large] == ["0001", "0005"]
    for path in large:
        down = pixels(path).astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(down - pixels(thumbs[int(path.name[:4])])).max() <= 1


def test_the_grid_is_numbered_and_says_what_it_is(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    assert sample(run_cli, folder, "--preview", "-n", "4", "-o", str(tmp_path / "grid.png"))[0] == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 34 - 2, 2 * (32 + 11 + 2) - 2)
        facts = json.loads(grid.text["pixelgrow"])  # type: ignore[attr-defined]
        label = np.asarray(grid.convert("L"))[33:43, :32]
    assert facts["preview"] and facts["index"] == [0, 1, 2, 3]
    assert label.min() < 100 and label.max() == 255  # ink on white


def test_the_best_of_several(run_cli: RunCli, folder: Path, tmp_path: Path) -> None:
    status, out = sample(run_cli, folder, "--best-of", "4", "--judge", "checker", "-o", str(tmp_path / "best"))
    assert status == 0 and "best of 4 by checker" in out
    (made,) = (tmp_path / "best").iterdir()
    assert pixels(made).shape == (64, 64, 3)
    number = int(made.name[:4])
    assert sample(run_cli, folder, "--pick", str(number), "-o", str(tmp_path / "same"))[0] == 0
    (same,) = (tmp_path / "same").iterdir()
    assert np.array_equal(pixels(same), pixels(made))


def test_a_judge_in_the_working_folder(
    run_cli: RunCli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = "def last(images, prompt):\n    return list(range(len(images)))\n"
    (tmp_path / "judge_in_the_working_folder.py").write_text(code, encoding="utf-8")
    words = ["--best-of", "3", "--judge", "judge_in_the_working_folder:last", "-o", "best"]
    done = run_cli("sample", folder, PROMPT, *FEW, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name[:4] for path in (tmp_path / "best").iterdir()] == ["0002"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "6", "--pick", "6"], "--pick 6: got '6', expected numbers of the preview, 0 to 5"),
        (["--pick", "64"], "0 to 63"),
        (["--pick", "1,x"], "got 'x'"),
        (["--pick", "-1"], "got '-1'"),
        (["--pick", "1", "--preview"], "--preview and --pick: expected one of them"),
        (["--best-of", "4"], "--best-of N and --judge NAME go together"),
        (["--judge", "checker"], "--best-of N and --judge NAME go together"),
        (["--best-of", "4", "--judge", "nowhere:me"], "judge 'nowhere:me': cannot be imported"),
        (["-n", "5", "--best-of", "4", "--judge", "checker"], "best of 4: got 5 to keep"),
    ],
)
def test_mistakes_are_one_line(run_cli: RunCli, folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    status, out = sample(run_cli, folder, *words, "-o", str(tmp_path / "x.png"))
    assert status == 2 and message in out and len(out.strip().splitlines()) == 1


def test_no_preview_of_a_model_that_is_not_exact(run_cli: RunCli, tmp_path: Path) -> None:
    exact = exact_model()
    from pixelgrow.growth import ungrown
    from pixelgrow.model import Model

    core = ungrown(exact.denoiser)
    plain = Model(core, exact.config.model_copy(update={"network": core.net.config}))
    plain.save_pretrained(tmp_path / "plain")
    status, out = sample(run_cli, tmp_path / "plain", "--preview", "-n", "2", "-o", str(tmp_path / "x.png"))
    assert status == 2 and "no preview: " in out and len(out.strip().splitlines()) == 1
