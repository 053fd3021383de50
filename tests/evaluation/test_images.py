"""What can be evaluated: models of ours, folders of images, pipelines; and what cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixelgrow
from cli_files import class_folder, class_model
from pipelines import SIDE, save_unconditional
from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.errors import UserError
from pixelgrow.evaluation.images import STEPS, OfFolder, OfModel, OfPipeline, average_of, eight_bit, open_candidate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_model(tmp_path_factory.mktemp("model") / "core" / "checkpoint")


def save(folder: Path, name: str, side: int = 16, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder


def line(name: str | Path, sampling: SamplingSpec | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_candidate(str(name), sampling)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_samples_of_a_model_are_those_that_it_samples(model: Path) -> None:
    candidate = open_candidate(str(model.parent), SamplingSpec(steps=2))  # a stage's folder
    assert isinstance(candidate, OfModel) and (candidate.size, candidate.conditions) == ((16, 16), "classes")
    made = candidate.make(["0", "2"], [7, 8], 3)
    asked = pixelgrow.load(model).sample(["0", "2"], seed=3, index=[7, 8], steps=2)
    assert made.images.dtype == torch.uint8 and made.nfe == 4
    assert np.abs(made.images.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(asked)).max() <= 1
    assert not candidate.make(["0", "2"], [7, 8], 4).images.equal(made.images)


def test_what_repeating_a_model_needs(model: Path, tmp_path: Path) -> None:
    candidate = open_candidate(str(model))
    config = checkpoint.read_config(model)
    said = candidate.describe()
    assert json.loads(json.dumps(said)) == said
    assert (said["sha256"], said["lineage"]) == (config.sha256, [{"stage": "core", "images": 12345}])
    assert said["sampling"] == {"grid": "karras", "steps": STEPS, "sampler": "dpm++2m", "guidance": 2.0}
    assert said["parameters"]["network"] == sum(p.numel() for p in pixelgrow.load(model).network.parameters())
    assert candidate.varied("guidance", 3.0).describe()["sampling"]["guidance"] == 3.0
    one_step = open_candidate(str(class_model(tmp_path / "one", one_step=True)))
    assert one_step.describe()["sampling"] == {} and one_step.make(["1"], [0], 0).nfe == 1
    assert "takes no such setting" in line(tmp_path / "one", SamplingSpec(steps=3))


def test_a_checkpoint_keeps_its_own_number_of_steps(model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text()) | {"sampling": {"steps": 5}}
    (copied / "config.json").write_text(json.dumps(config))
    assert open_candidate(str(copied)).describe()["sampling"]["steps"] == 5
    assert open_candidate(str(copied), SamplingSpec(steps=7)).describe()["sampling"]["steps"] == 7


def test_weights_without_a_hash_get_one(model: Path) -> None:
    found = []
    for value in (0.0, 0.0, 1.0):
        candidate = open_candidate(str(model))
        assert isinstance(candidate, OfModel)
        candidate.model.config = candidate.model.config.model_copy(update={"sha256": ""})  # as an unfinished stage's
        with torch.no_grad():
            candidate.model.network.net.exit["16"].conv.bias.fill_(value)
        found.append(candidate.describe()["sha256"])
    assert found[0] == found[1] != found[2] and len(found[0]) == 64


def test_which_average_a_checkpoint_holds(model: Path) -> None:
    config = checkpoint.read_config(model)
    assert average_of(model, config) is None
    record = model.parent / "stage.json"
    record.write_text(json.dumps({"settings": {"ema": [0.05, 0.1]}, "done": True}))
    assert average_of(model, config) == {"length": 0.05}
    record.unlink()

    def ends_in(*entries: dict[str, object]) -> CheckpointConfig:
        return config.model_copy(update={"lineage": [*config.lineage, *entries]})

    averaged = {"verb": "average", "length": 0.1, "images": 500}
    assert average_of(model, ends_in(averaged, {"verb": "cast"})) == {"length": 0.1, "images": 500}
    assert average_of(model, ends_in(averaged, {"verb": "grow"})) is None


def test_a_folder_of_images_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for i, name in enumerate(("b.png", "a.png", "deep/c.png")):
        save((tmp_path / "made" / name).parent, Path(name).name, seed=i)
    candidate = open_candidate(str(tmp_path / "made"))
    assert isinstance(candidate, OfFolder) and (candidate.size, list(candidate.prompts)) == ((16, 16), [""] * 3)
    images = candidate.make([""] * 2, [0, 2], 0).images.permute(0, 2, 3, 1).numpy()
    for got, name in zip(images, ("a.png", "deep/c.png"), strict=True):
        assert np.array_equal(got, np.asarray(Image.open(tmp_path / "made" / name)))
    assert candidate.describe()["images"] == 3
    save(tmp_path / "made", "a.png", seed=9)
    assert open_candidate(str(tmp_path / "made")).describe() != candidate.describe()


def test_prompts_of_a_folder_are_its_captions(tmp_path: Path) -> None:
    folder = save(save(tmp_path / "made", "1.png"), "0.png", seed=1)
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "0.png", "text": "nought"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_candidate(str(folder)).prompts == ["one", "nought"]
    (folder / "metadata.jsonl").unlink()
    for i in range(2):
        (folder / f"{i}.txt").write_text(f"image {i}")
    assert open_candidate(str(folder)).prompts == ["image 0", "image 1"]


def test_mistakes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no samples in it" in line(tmp_path / "empty")
    save(save(tmp_path / "mixed", "a.png"), "b.png", side=32)
    assert "images of 2 sizes (a.png: 16x16, b.png: 32x32); expected one size" in line(tmp_path / "mixed")
    (save(tmp_path / "bad", "a.png") / "b.png").write_bytes(b"no image")
    assert "bad: 1 of its images cannot be read (the first: b.png: not a JPEG" in line(tmp_path / "bad")
    assert "steps: " in line(save(tmp_path / "ok", "a.png"), SamplingSpec(steps=3))
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "stage.json").write_text("{}")
    assert "is a stage that is not finished" in line(tmp_path / "stage")
    assert "nowhere is not a checkpoint" in line("nowhere")
    assert "cannot be fetched from the hub" in line("nobody/nothing")  # the tests are offline
    assert "expected a plain .tar" in line(model / "config.json") or "no tar" in line(model / "config.json")
    data = bytearray((class_folder(tmp_path) / "0" / "a.png").read_bytes())
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "a.png").write_bytes(data[:60])
    with pytest.raises(UserError, match=r"torn: a\.png cannot be read"):
        open_candidate(str(torn)).make([""], [0], 0)


def test_images_that_are_not_finite(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"it: 1 of images 4 to 6 hold NaN or infinity \(the first: 5\)"):
        eight_bit(images, "it", [4, 5, 6])
    generator = open_candidate(str(class_model(tmp_path / "one", one_step=True)))
    assert isinstance(generator, OfModel)
    with torch.no_grad():
        generator.model.network.net.exit["16"].conv.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="hold NaN or infinity"):
        generator.make(["0"], [0], 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pipeline_tells_its_size_by_an_image(tmp_path: Path) -> None:
    candidate = open_candidate(str(save_unconditional(tmp_path / "pipeline")), SamplingSpec(steps=2))
    assert isinstance(candidate, OfPipeline) and (candidate.size, candidate.conditions) == ((SIDE, SIDE), "nothing")
    made = candidate.make(["", ""], [0, 1], 0)
    assert (made.images.shape, made.images.dtype, made.nfe) == ((2, 3, SIDE, SIDE), torch.uint8, 2)
    assert candidate.varied("steps", 3).describe()["sampling"] == {"steps": 3}
    images, _ = candidate.pipeline(["", ""], [0, 1], 0, {"steps": 2})
    assert (made.images.float() / 255 - images).abs().max() <= 0.5 / 255 + 1e-6
