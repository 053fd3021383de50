"""Teachers of ours other than a core of captions, through a recipe: of classes, and grown either way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pixelgrow import checkpoint
from pixelgrow.recipe.read import load_recipe
from pixelgrow.run import run
from pixelgrow.stages import distill, looks, train
from runs import class_images


@pytest.mark.parametrize(("of", "init", "side"), [("classes", "preserve", 8), ("captions", "random", 16)])
def test_a_grown_teacher_is_distilled_through_a_recipe(tmp_path: Path, of: str, init: str, side: int) -> None:
    if of == "classes":
        data = f"text: {{classes: 2}}\ndata: {{source: {class_images(tmp_path)}}}\nheldout: {{fraction: 0.2}}"
    else:
        data = (
            "data: {source: scenes, n: 200, captions: 8}\nheldout: {source: scenes, split: heldout, n: 8, captions: 8}"
        )
    small = "images: 8, batch: 8, sample_every: 0, snapshot_every: 0"
    (tmp_path / "recipe.yaml").write_text(f"""
name: t
{data}
stages:
  - train: {{name: core, size: tiny, resolution: {side}, {small}}}
  - grow: {{name: grown, to: {2 * side}, init: {init}, {small}}}
  - pairs: {{name: pairs, from: grown, n: 8, batch: 8, shard: 8, steps: 3}}
  - distill: {{name: onestep, from: grown, pairs: pairs, validate_every: 8, {small}}}
  - grow: {{name: larger, from: onestep, pairs: pairs, to: {4 * side}, validate_every: 8, {small}}}
  - evaluate: {{name: eval, prompts: 2}}
""")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, distill):
            patch.setattr(module, "WATCHED", 4)
        patch.setattr(looks, "GRID_STEPS", 2)
        run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    teacher, _ = checkpoint.load(tmp_path / "t" / "grown" / "checkpoint")
    low, config = checkpoint.load_generator(tmp_path / "t" / "onestep" / "checkpoint")
    assert (low.resolution, low.latent_resolution) == (2 * side, 2 * side)
    assert low.net.config == teacher.net.config  # all of the grown network is the generator
    moved = [n for n, t in low.net.state_dict().items() if not torch.equal(t, teacher.net.state_dict()[n])]
    assert {n.split(".")[0] for n in moved} >= {"core", "decoder", "exit"}
    assert [e["verb"] for e in config.lineage] == ["train", "grow", "distill"]
    high, _ = checkpoint.load_generator(tmp_path / "t" / "larger" / "checkpoint")
    assert (high.resolution, high.latent_resolution) == (4 * side, 2 * side)
    log = [json.loads(line) for line in (tmp_path / "t" / "larger" / "log.jsonl").read_text().splitlines()]
    (drift,) = [line["validation/drift_psnr"] for line in log if "validation/drift_psnr" in line][-1:]
    assert drift > 15
