"""Models of stages that are not finished: their latest saved average, which the finished checkpoint would hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pixelgrow
from conftest import RunCli
from pixelgrow.errors import UserError
from pixelgrow.model import OneStepModel
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.training import state
from runs import class_images, few_samples, stopped_after

QUIET: dict[str, Any] = {"sample_every": 0, "validate_every": 0, "snapshot_every": 0, "save_every": 8, "batch": 8}


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


def recipe_of(folder: Path) -> Recipe:
    return read_recipe(
        {
            "name": "c",
            "text": {"classes": 2},
            "data": {"source": str(folder / "images")},
            "stages": [
                {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 16, "ema": [0.2], **QUIET}},
                {"grow": {"name": "grown", "to": 32, "images": 24, "core": {"unfreeze_after": 8}, "lr": 1e-2, **QUIET}},
                {"pairs": {"name": "pairs", "from": "core", "n": 8, "batch": 8, "shard": 8, "steps": 2}},
                {"distill": {"name": "onestep", "pairs": "pairs", "images": 8, **QUIET}},
                {"grow": {"name": "onestep32", "pairs": "pairs", "to": 32, "images": 8, **QUIET}},
            ],
        },
        "test",
    )


# Each stage at its end, before it writes its checkpoint; the growth also at the end of its frozen phase.
STOPS = {"core": (16,), "grown": (8, 24), "onestep": (8,), "onestep32": (8,)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished")
    class_images(folder)
    return folder


def test_an_unfinished_stage_is_its_latest_average(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe, early = recipe_of(root), {}
    for name, stops in STOPS.items():
        for images in stops:
            with stopped_after(images):
                run(recipe, root)
            caplog.clear()
            early[name] = pixelgrow.load(root / "c" / name)
            total = recipe.stage(name).images  # type: ignore[union-attr]
            assert caplog.messages == [
                f"{root / 'c' / name} is not finished: this is its average after {images} of {total} images"
            ]
            assert early[name].config.lineage[-1]["stopped_after"] == images
    run(recipe, root)
    for name, model in early.items():
        done = pixelgrow.load(root / "c" / name)
        assert isinstance(model, OneStepModel) == isinstance(done, OneStepModel) == name.startswith("onestep")
        tensors, wanted = model.network.state_dict(), done.network.state_dict()
        assert tensors.keys() == wanted.keys()
        assert all(tensors[n].equal(t) for n, t in wanted.items())
        assert not model.network.training
        lineage = [{k: v for k, v in entry.items() if k != "stopped_after"} for entry in model.config.lineage]
        assert model.config.model_copy(update={"lineage": lineage, "sha256": done.config.sha256}) == done.config


def test_a_frozen_phase_has_the_core_of_its_start(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root).model_copy(update={"name": "f"})
    with stopped_after(8):
        run(recipe, tmp_path)
    with pytest.raises(UserError, match=r"grown is not a checkpoint"):
        pixelgrow.load(tmp_path / "f" / "grown")
    with stopped_after(16):
        run(recipe, tmp_path)
    core = pixelgrow.load(tmp_path / "f" / "core").network.state_dict()
    with stopped_after(8):
        run(recipe, tmp_path)
    grown = pixelgrow.load(tmp_path / "f" / "grown").network.state_dict()
    assert all(grown[n].equal(t) for n, t in core.items())
    trained = {n: t for n, t in grown.items() if n not in core}
    found = state.find(tmp_path / "f" / "grown" / "frozen" / "state")
    assert found is not None
    first = found.read("ema/0.05/denoiser/")
    assert trained.keys() == {n.removeprefix("ema/0.05/denoiser/") for n in first}
    assert all(t.equal(first[f"ema/0.05/denoiser/{n}"]) for n, t in trained.items())


def test_sampling_from_a_stage_that_runs(root: Path, tmp_path: Path, run_cli: RunCli) -> None:
    recipe = recipe_of(root).model_copy(update={"name": "s"})
    stage, words = tmp_path / "s" / "core", ["sample", "s/core", "light", "--steps", "2", "-o", "light.png"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pixelgrow.stages.train.loop.train", _interrupted)
        run(recipe, tmp_path)
    early = run_cli(*words, cwd=tmp_path)
    assert (early.code, early.err.count("\n")) == (2, 1)
    assert "s/core is a stage that is not finished and has saved no average yet: no stage beside it" in early.err
    with stopped_after(8):
        run(recipe, tmp_path)
    saving = stage / "state" / ".16.part"  # a save in progress
    saving.mkdir()
    made = run_cli(*words, cwd=tmp_path)
    assert (made.code, made.out) == (0, "light.png\n")
    assert made.err.startswith("s/core is not finished: this is its average after 8 of 16 images\n")
    assert saving.exists()
    facts = json.loads(Image.open(tmp_path / "light.png").text["pixelgrow"])  # type: ignore[attr-defined]
    assert (facts["checkpoint"], facts["stopped_after"]) == ("s/core", 8)
    assert "s is a run: name one of s/core, " in run_cli("sample", "s", "light", cwd=tmp_path).err
    newest = stage / "state" / f"{8:012d}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    damaged = run_cli(*words, cwd=tmp_path)
    assert (damaged.code, damaged.err.count("\n")) == (2, 1)
    assert "state.safetensors is damaged" in damaged.err


def test_weights_are_taken_where_there_is_no_average(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root)
    core = recipe.stages[0].model_copy(update={"ema": ()})
    recipe = recipe.model_copy(update={"name": "w", "stages": (core,)})
    with stopped_after(16):
        run(recipe, tmp_path)
    early = pixelgrow.load(tmp_path / "w" / "core").network.state_dict()
    run(recipe, tmp_path)
    done = pixelgrow.load(tmp_path / "w" / "core").network.state_dict()
    assert all(early[n].equal(t) for n, t in done.items())


def _interrupted(*args: Any, **keywords: Any) -> None:
    raise KeyboardInterrupt
