"""The data of a run: whether they have changed, and what each stage sees of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.test_identity import classes, paired
from data.test_sources import an_image
from pixelgrow.data.account import Account
from pixelgrow.data.buckets import Shapes
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import read_recipe
from pixelgrow.recipe.stages import Recipe
from pixelgrow.run import run
from pixelgrow.stages.data import StageData
from pixelgrow.stages.foresight import foreseen
from pixelgrow.text.cut import Cut

CORE = {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "batch": 8, "sample_every": 0,
        "validate_every": 0, "snapshot_every": 0}  # fmt: skip


def recipe(source: str | Path, *stages: dict[str, Any], **head: Any) -> Recipe:
    raw = {"name": "r", "text": {"classes": 2}, "data": {"source": str(source)}} | head
    return read_recipe(raw | {"stages": list(stages) or [{"train": CORE}]}, "test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with class folders in `set` and a finished run in `runs`."""
    folder = tmp_path_factory.mktemp("finished")
    run(recipe(classes(folder / "set", 48)), folder / "runs")
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` with other file times."""
    folder = tmp_path / "copied"
    shutil.copytree(finished, folder)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def test_a_run_resumes_with_the_same_data_at_another_path(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "link").symlink_to(copied / "set")
    monkeypatch.chdir(copied)
    for source in ("set", "set/", "link", str(copied / "set")):
        run(recipe(source), copied / "runs")


def forget_times(record: Path) -> None:
    """Rewrite a `stage.json` as an earlier version wrote it, with fingerprints of time stamps."""
    record.write_text(record.read_text(encoding="utf-8").replace("content1-", ""), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda at: (at / "set/a/2.png").unlink(), r"set changed since it was begun: 1 file is gone \(a/2.png\): put"),
        (
            lambda at: (at / "set/b/3.png").rename(at / "set/b/99.png"),
            r"gone \(b/3.png\), 1 file is new \(b/99.png\): ",
        ),
        (
            lambda at: forget_times(at / "runs/r/core/stage.json"),
            "an earlier version began it and identified .*/set by the times of its files, .* another name, or delete",
        ),
    ],
    ids=["gone", "renamed", "earlier version"],
)
def test_changed_data_are_refused_and_the_difference_is_named(
    copied: Path, change: Callable[[Path], object], words: str
) -> None:
    change(copied)
    with pytest.raises(UserError, match=rf"^stage 'core': .*{words}") as error:
        run(recipe(copied / "set"), copied / "runs")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [classes, paired])
def test_a_run_does_not_train_on_its_own_images(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    text = {"encoder": "minilm"} if make is paired else {"classes": 2}
    with pytest.raises(UserError, match=r"runs/r: this run's folder lies in .*set, whose images .* with --runs"):
        run(recipe(folder, text=text), folder / "runs")


def test_another_held_out_part_is_refused_and_named(copied: Path) -> None:
    with pytest.raises(UserError, match=r"what is held out of .*/set changed since it was begun \(heldout or seed\)"):
        run(recipe(copied / "set", heldout={"fraction": 0.4}), copied / "runs")


def small_ones(folder: Path) -> Path:
    """Class folders with 60 images: 20 of them of 8 px, one of them cut off in its header."""
    classes(folder, 60)
    for i in range(20):
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(an_image(8, 8, i))
    (folder / "b" / "59.png").write_bytes(b"")
    return folder


def test_every_stage_reports_what_it_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    core = CORE | {"bad_limit": 0.1}
    pairs = {"name": "pairs", "from": "core", "n": 12, "sampler": "ddim", "steps": 2, "batch": 4, "shard": 4,
             "direction": "sample", "guidance": "captions", "bad_limit": 0.1}  # fmt: skip
    distil = {k: v for k, v in core.items() if k not in ("size", "resolution")}
    stages = (
        {"train": core},
        {"pairs": pairs},
        {"estimate": {"name": "omega", "from": "core", "pairs": "pairs", "images": 8, "batch": 4}},
        {
            "distill": distil
            | {"name": "onestep", "from": "core", "pairs": "pairs", "fraction": 0.5, "estimator": "omega"}
        },
        {"evaluate": {"name": "eval", "from": "core", "prompts": 4, "steps": 1}},
    )
    caplog.set_level("INFO", "pixelgrow")
    planned = recipe(small_ones(tmp_path / "set"), *stages, heldout={"fraction": 0.3})
    run(planned, tmp_path)
    said = [r.getMessage() for r in caplog.records if " sees " in r.getMessage()]
    assert len(said) == len(set(said)) == 6
    foresight = foreseen(planned)
    images = "27 of 60 images: 14 too small, 18 held out, 1 bad"
    expected = {
        "core": [images],
        "pairs": [f"12{images[2:]}, 15 beyond n"],
        "omega": ["11 of 12 pairs: 1 held out"],
        "onestep": [images, "6 of 12 pairs: 6 beyond fraction"],
        "eval": ["4 of 18 held-out images: 6 too small, 8 beyond prompts"],
    }
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    for stage, lines in expected.items():
        stored = json.loads((tmp_path / "r" / stage / "stage.json").read_text(encoding="utf-8"))["sees"]
        accounts = [Account.from_stored(a).line() for a in stored]
        assert accounts == [f"sees {line}" for line in lines]
        assert [line.removeprefix(f"{stage}: ") for line in said if line.startswith(f"{stage}: ")] == accounts
        assert all(f"<p>S{line[1:]}.</p>" in page for line in accounts)
        assert stage == "omega" or foresight.accounts[stage].line() == accounts[0]
    assert foresight.held_out == "18 of 59 images"
    assert "<td>27 of 60</td>" in page and "<td>27 of 60<br>6 of 12 pairs</td>" in page


def test_held_out_images_have_one_order_at_every_size(tmp_path: Path) -> None:
    data = StageData(recipe(classes(tmp_path / "set", 80), heldout={"fraction": 0.3}), None)  # 40 to 119 wide, 30 high
    orders = {w: [s.key(i) for s, i in data.heldout_order(Shapes((30, w)))] for w in (1, 60, 90)}
    for w, order in orders.items():
        assert order == [key for key in orders[1] if 40 + int(key[2:-4]) >= w]
    assert orders[1][:4] == ["b/5.png", "b/77.png", "a/70.png", "b/71.png"]  # pinned


def test_captions_that_are_cut_are_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, held = paired(tmp_path / "set"), paired(tmp_path / "held" / "out")
    for one in (folder, held):
        (one / "2.txt").write_text("a caption of more words than so few tokens hold")
    unseen = "more words than so few tokens hold"
    evaluate = {"name": "eval", "prompts": 4, "steps": 1}
    stages = {"train": CORE}, {"evaluate": evaluate}
    caplog.set_level("INFO", "pixelgrow")
    head = {"text": {"encoder": "minilm", "max_tokens": 6}, "heldout": {"source": str(held.parent)}}
    run(recipe(folder, *stages, **head), tmp_path)
    for stage in ("core", "eval"):
        cut = json.loads((tmp_path / "r" / stage / "stage.json").read_text(encoding="utf-8"))["cut"]
        assert cut == {"captions": 1, "total": 4, "max_tokens": 6, "unseen": unseen}
    said = [r.getMessage() for r in caplog.records if "does not see" in r.getMessage()]
    assert said == [f"{stage}: {Cut(**cut).line()}" for stage in ("core", "eval")]
    assert (tmp_path / "r" / "report.html").read_text(encoding="utf-8").count(
        "1 of 4 captions is longer than 6 tokens"
    ) == 2


def test_a_run_keeps_a_list_of_its_samples(finished: Path) -> None:
    (kept,) = (finished / "runs" / "r" / "data").iterdir()
    data = json.loads((finished / "runs/r/core/stage.json").read_text(encoding="utf-8"))["settings"]["data"]
    assert data[0]["fingerprint"].startswith(kept.name.removesuffix(".jsonl.gz"))
