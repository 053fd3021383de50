"""Recipes that need many GPUs have tiny twins: the same stages, which run to their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixelgrow import checkpoint
from pixelgrow.plan.cluster import place
from pixelgrow.plan.gpus import Cluster
from pixelgrow.plan.shapes import networks
from pixelgrow.recipe.read import load_recipe
from pixelgrow.recipe.stages import GrowStage, ModelStage, TrainStage
from pixelgrow.run import run
from pixelgrow.stages import looks

TWINS = {"huge": "smoke-vermeer", "cc12m": "smoke-cc12m"}
ALIKE = (  # what a twin's stages must share with those of its recipe
    "name", "parent", "init", "core", "decay", "lr", "noise", "preset", "blocks", "pairs", "estimator", "direction",
    "sampler", "guidance", "distribution", "optimizer", "betas", "sampling",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "GRID_STEPS", 1)
    monkeypatch.setattr(looks, "GRID", 1)


def stages_of(name: str) -> list[dict[str, Any]]:
    found = []
    for stage in load_recipe(name).stages:
        kept: dict[str, Any] = {n: getattr(stage, n) for n in ALIKE if hasattr(stage, n)}
        kept |= {"kind": type(stage)}
        if isinstance(stage, TrainStage):
            kept |= {"mixture": [spec.weight for spec in stage.data or ()]}
        found.append(kept)
    return found


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_stages_of_its_recipe(name: str) -> None:
    whole, twin = load_recipe(name), load_recipe(TWINS[name])
    assert stages_of(TWINS[name]) == stages_of(name)
    for big, small in zip(whole.stages, twin.stages, strict=True):
        if isinstance(big, GrowStage) and isinstance(small, GrowStage):
            assert (big.unfreeze_after or 0) / big.images == (small.unfreeze_after or 0) / small.images


def test_vermeers_twin_runs(tmp_path: Path) -> None:
    report = run(load_recipe("smoke-vermeer"), tmp_path)
    model, config = checkpoint.load(tmp_path / "smoke-vermeer" / "tuned" / "checkpoint")
    assert report.is_file() and model.resolution == 64
    assert [entry["stage"] for entry in config.lineage] == ["core", "raw", "tuned"]
    core, _ = checkpoint.load(tmp_path / "smoke-vermeer" / "core" / "checkpoint")
    raw, _ = checkpoint.load(tmp_path / "smoke-vermeer" / "raw" / "checkpoint")
    frozen = core.net.core.state_dict()
    assert all(t.equal(frozen[n]) for n, t in raw.net.core.state_dict().items())
    assert not all(t.equal(frozen[n]) for n, t in model.net.core.state_dict().items())
    assert any((tmp_path / "smoke-vermeer" / "tuned" / "samples").glob("*.png"))


def test_the_twin_of_cc12m_runs(tmp_path: Path) -> None:
    run(load_recipe("smoke-cc12m"), tmp_path)
    folder = tmp_path / "smoke-cc12m"
    config = checkpoint.read_config(folder / "onestep512" / "checkpoint")
    assert config.objective == "generate" and config.network.guided
    assert (config.network.resolution, config.network.latent_resolution) == (32, 16)
    assert checkpoint.read_config(folder / "grown" / "checkpoint").sampling["guidance"] == 4
    for name in ("eval-grown", "eval-onestep"):
        assert json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))


def test_cc12m_fits_on_four_machines() -> None:
    recipe = load_recipe("cc12m")
    assert networks(recipe)["onestep512"].resolution == 512
    first = recipe.model_copy(update={"stages": recipe.stages[:2]})
    for placed, stage in zip(place(first, Cluster(32, "h100")), [first.stages[0], *[first.stages[1]] * 2], strict=True):
        assert placed.layout is not None and isinstance(stage, ModelStage)
        assert str(placed.layout) == "replicate" and placed.layout.micro_batch == stage.micro_batch
