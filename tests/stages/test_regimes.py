"""Stages on class folders: the regimes of growth, evaluation, held-out data, bad files."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import pixelgrow
import pixelgrow.stages.data
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.buckets import square
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.sampling import Samples, sample
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.recipe.stages import RESERVED
from pixelgrow.run import run
from pixelgrow.stages.materials import Materials
from runs import WEIGHTS, class_images, class_recipe, few_samples, own_files, record


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


@pytest.fixture(scope="module")
def regimes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grows one core in four ways, from a folder of two classes."""
    root = tmp_path_factory.mktemp("classes")
    class_images(root)
    small = "images: 8, batch: 8, sample_every: 0, validate_every: 0, snapshot_every: 0"
    (root / "recipe.yaml").write_text(f"""
name: classes
text: {{classes: 2}}
data: {{source: {root / "images"}}}
heldout: {{fraction: 0.2}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, {small}}}
  - grow: {{name: frozen, from: core, to: 32, init: random, core: frozen, {small}}}
  - grow: {{name: finetune, from: core, to: 32, init: random, core: finetune, {small}}}
  - grow: {{name: scratch, from: core, to: 32, init: scratch, {small}}}
  - grow: {{name: twice, from: core, to: [32, 64], {small}}}
  - train: {{name: tuned, from: frozen, sampling: {{steps: 2, guidance: 1}}, {small}}}
  - evaluate: {{name: eval, prompts: 4}}
""")
    run(load_recipe(root / "recipe.yaml"), root)
    return root / "classes"


def test_the_list_of_samples_is_reserved(regimes: Path) -> None:
    assert {"data", "report.html"} <= own_files(regimes) <= set(RESERVED)


def core_of(folder: Path) -> dict[str, Any]:
    return {n: t for n, t in load_file(folder / WEIGHTS).items() if n.startswith("core.")}


def test_regimes_of_growth(regimes: Path) -> None:
    core = core_of(regimes / "core")

    def kept(stage: str) -> list[bool]:
        grown = core_of(regimes / stage)
        assert grown.keys() == core.keys()
        return [grown[n].equal(core[n]) for n in core]

    assert all(kept("frozen"))
    assert not all(kept("finetune"))
    assert not all(kept("scratch"))
    assert all(kept("twice"))
    assert not all(kept("tuned"))
    growth = json.loads((regimes / "scratch" / "growth.json").read_text())
    assert growth["loaded"] == []
    parameters = record(regimes / "frozen")["result"]["parameters"]
    assert parameters["all"] - parameters["training"] == sum(t.numel() for t in core.values())


def test_no_evaluation_takes_more_rows_than_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: set[int] = set()
    real = Denoiser.forward

    def forward(self: Denoiser, x: Tensor, *rest: Any) -> Tensor:
        rows.add(len(x))
        return real(self, x, *rest)

    small = "images: 8, batch: 8, accumulate: 4, validate_every: 8, sample_every: 8, snapshot_every: 0"
    (tmp_path / "recipe.yaml").write_text(f"""
name: c
text: {{classes: 2}}
data: {{source: {class_images(tmp_path)}}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, {small}}}
  - grow: {{name: grown, to: 32, {small}}}
  - evaluate: {{name: eval, prompts: 4, steps: 1, guidance: 1, batch: 2}}
""")
    monkeypatch.setattr(Denoiser, "forward", forward)
    run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    assert max(rows) == 2


def test_evaluation_holds_one_batch_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a batch are gone before the next are made; the metrics are those of one batch of all of them."""
    live: list[weakref.ref[Tensor]] = []

    def watched(*args: Any, **settings: Any) -> Samples:
        assert not [t for t in live if t() is not None]
        made = sample(*args, **settings)
        live.append(weakref.ref(made.images))
        return made

    monkeypatch.setattr("pixelgrow.model.sample", watched)
    small = "images: 8, batch: 8, validate_every: 0, sample_every: 0, snapshot_every: 0"
    (tmp_path / "recipe.yaml").write_text(f"""
name: c
data: {{source: scenes, n: 40, captions: 8}}
stages:
  - train: {{name: core, size: tiny, resolution: 32, {small}}}
  - evaluate: {{name: whole, prompts: 5, steps: 1, batch: 5}}
  - evaluate: {{name: parts, prompts: 5, steps: 1, batch: 2}}
""")
    run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    assert len(live) == 1 + 3
    whole, parts = (json.loads((tmp_path / "c" / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    for key in ("error", "seams", "accuracy", "details"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4)
    assert (parts["prompts"], parts["nfe"]) == (5, 2)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    images = Materials(recipe, tmp_path / "c").heldout(5, square(32)).batch(range(5))
    blocks = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert whole["details"]["images"] == pytest.approx(blocks.var(-1, correction=0).mean().item(), rel=1e-4)
    assert whole["details"]["samples"] != pytest.approx(whole["details"]["images"], rel=1e-2)
    grids = [np.asarray(Image.open(tmp_path / "c" / name / "samples" / "grid.png"), int) for name in ("whole", "parts")]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_evaluation_without_a_checker(regimes: Path) -> None:
    metrics = json.loads((regimes / "eval" / "metrics.json").read_text())
    assert "accuracy" not in metrics
    assert (metrics["sampling"]["steps"], metrics["sampling"]["guidance"], metrics["nfe"]) == (2, 1, 2)
    assert (regimes / "eval" / "samples" / "grid.png").exists()


def test_a_model_of_classes_knows_their_names(regimes: Path) -> None:
    model = pixelgrow.load(regimes / "frozen")
    assert model.config.text["classes"] == ["dark", "light"]
    named, numbered = (model.sample([prompt], steps=1)[0].tobytes() for prompt in ("light", "1"))
    assert named == numbered


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, r"has class folders, not captions, .* 'minilm' .* write text: \{classes: 2\}"),
        ({"classes": 1}, r"has 2 class folders, the recipe says text: \{classes: 1\}: write \{classes: 2\}"),
    ],
)
def test_class_folders_are_no_captions(tmp_path: Path, text: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        run(class_recipe(tmp_path, text), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c" / "core").exists()


def test_a_label_means_one_class(tmp_path: Path) -> None:
    other = class_images(tmp_path / "other")
    (other / "dark").rename(other / "middle")
    with pytest.raises(UserError, match=r"folders of other classes \(light, middle\) than .* \(dark, light\)"):
        run(class_recipe(tmp_path, {"classes": 2}, data={"source": str(other)}), tmp_path)


def materials_of(folder: Path) -> Materials:
    other = folder.parent / "other"
    if not other.exists():
        shutil.copytree(folder, other)
    sources = [{"source": str(folder), "weight": 3}, {"source": str(other), "weight": 1}]
    raw = {"name": "mix", "data": sources, "heldout": {"fraction": 0.3}, "text": {"classes": 2}}
    stage = {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 8}}
    return Materials(read_recipe(raw | {"stages": [stage]}, "test"), folder.parent / "run")


def test_data_are_indexed_once_for_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = pixelgrow.stages.data.open_mixture
    monkeypatch.setattr("pixelgrow.stages.data.open_mixture", lambda specs: opened.append(specs) or real(specs))
    recipe = class_recipe(tmp_path, {"classes": 2}, data={"source": str(tmp_path / "images")})
    materials = Materials(recipe, tmp_path)
    for _ in range(3):
        materials.describe(recipe.stages[0])
    assert len(opened) == 1


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    materials = materials_of(class_images(tmp_path))
    mixture = materials.data.mixture(materials.recipe.stages[0])  # type: ignore[arg-type]
    assert mixture.weights == [3, 1]
    train, held = mixture.sources[0], materials.data.heldout_sources[0]
    keys = [{s.key(i) for i in range(len(s))} for s in (train, held)]
    assert len(keys[0]) + len(keys[1]) == 24
    assert not keys[0] & keys[1]
    assert len(materials.heldout(5, square(16)).images) == 5


def test_a_bad_held_out_file_is_accounted_for(tmp_path: Path) -> None:
    folder = class_images(tmp_path)
    name = materials_of(folder).data.heldout_sources[0].key(0)
    path = next(p for p in folder.rglob("*.png") if str(p).endswith(name))
    path.write_bytes(path.read_bytes()[:2000])
    materials = materials_of(folder)
    mixture = materials.data.mixture(materials.recipe.stages[0])  # type: ignore[arg-type]
    bad = BadFiles(mixture.sources, 0.5, tmp_path / "bad_files.jsonl")
    materials.account(materials.heldout(100, square(16)), mixture, bad)
    assert [file.key for file in bad.files()] == [name]


def test_the_phases_of_a_stage_share_an_account_of_bad_files(tmp_path: Path) -> None:
    """Half of the files are bad. The first phase finds nearly all of them."""
    folder = class_images(tmp_path)
    for path in sorted(folder.rglob("*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:2000])
    small = "batch: 8, bad_limit: 1, sample_every: 0, validate_every: 0, snapshot_every: 0"
    (tmp_path / "recipe.yaml").write_text(f"""
name: c
text: {{classes: 2}}
data: {{source: {folder}}}
heldout: {{fraction: 0.2}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, images: 8, {small}}}
  - grow: {{name: grown, to: 32, core: {{unfreeze_after: 48}}, images: 56, {small}}}
""")
    run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    grown = tmp_path / "c" / "grown"
    result = record(grown)["result"]
    first, second = (phase["bad_files"] for phase in result["phases"])
    assert 0 < first <= second == result["bad_files"]
    assert len((grown / "bad_files.jsonl").read_text().splitlines()) == second
    assert not (grown / "frozen" / "bad_files.jsonl").exists()


def test_growth_in_steps_is_one_identity(regimes: Path) -> None:
    growth = json.loads((regimes / "twice" / "growth.json").read_text())
    assert growth["resolution"] == [16, 64]
    assert len(growth["loaded"]) == len(load_file(regimes / "core" / WEIGHTS))
    assert growth["frozen"] == growth["loaded"]
    assert growth["before"] == pytest.approx(growth["after"])


def test_a_parent_of_another_text_encoder_is_refused(regimes: Path) -> None:
    recipe = load_recipe(
        "smoke",
        ["name=other", f"stages=[{{grow: {{name: g, from: {regimes / 'core'}, to: 32, images: 8, batch: 8}}}}]"],
    )
    with pytest.raises(UserError, match="was trained with the text encoder 'labels:2'"):
        run(recipe, regimes.parent)
