"""`pixelgrow graft`: rungs of one model on the same core of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import RunCli
from exact_models import exact_model
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.growth import ungrown
from pixelgrow.model import Model

PROMPT = "a red circle above two blue stars"


def changed(model: Model, part: str, seed: int) -> Model:
    """A copy whose tensors at `part` are other ones."""
    other = Model(Denoiser(type(model.denoiser.net)(model.denoiser.net.config), model.config.diffusion), model.config)
    other.denoiser.load_state_dict(model.denoiser.state_dict())
    for name, p in other.denoiser.net.named_parameters():
        if name.split(".")[1] == part:
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    other.denoiser.eval()
    return other


def test_two_packs_of_details_have_the_same_thumbnails(run_cli: RunCli, tmp_path: Path) -> None:
    one = exact_model()
    two = changed(one, "64", 3)
    two.config = two.config.model_copy(update={"text": two.config.text | {"encoder": "elsewhere/minilm"}})
    core = ungrown(one.denoiser)
    for name, model in {
        "one": one, "two": two, "core": Model(core, one.config.model_copy(update={"network": core.net.config})),
    }.items():  # fmt: skip
        model.save_pretrained(tmp_path / name)
    samples = {}
    for below in ("core", "one"):
        done = run_cli("graft", tmp_path / below, "--rung", tmp_path / "two", "-o", tmp_path / f"{below}-two")
        assert done.code == 0, done.err
        grafted = Model.from_pretrained(tmp_path / f"{below}-two")
        grafted.config = grafted.config.model_copy(update={"text": one.config.text})
        entry = grafted.config.lineage[-1]
        assert entry["verb"] == "graft" and bool(entry["tensors"]["dropped"]) == (below == "one")
        samples[below] = np.asarray(grafted.sample(PROMPT, steps=3)[0], np.float64)
    assert np.array_equal(samples["core"], samples["one"])
    first = np.asarray(one.sample(PROMPT, steps=3)[0], np.float64)
    assert np.abs(first - samples["one"]).max() > 4

    def down(image: np.ndarray) -> np.ndarray:
        return image.reshape(32, 2, 32, 2, 3).mean((1, 3))

    assert np.abs(down(first) - down(samples["one"])).max() <= 1


@pytest.mark.parametrize(("part", "words"), [("32", "tensors below the rung differ, "), ("", "no rung above its core")])
def test_another_core_is_refused_in_a_line(run_cli: RunCli, tmp_path: Path, part: str, words: str) -> None:
    one = exact_model()
    core = ungrown(one.denoiser)
    alone = Model(core, one.config.model_copy(update={"network": core.net.config}))
    (changed(one, part, 1) if part else alone).save_pretrained(tmp_path / "donor")
    one.save_pretrained(tmp_path / "one")
    done = run_cli("graft", tmp_path / "one", "--rung", tmp_path / "donor", "-o", tmp_path / "out")
    assert done.code == 2 and words in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
