"""diffusers pipelines of text, of classes and of nothing, each with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import SIDE, save_of_classes, save_of_text, save_unconditional
from pixelgrow.errors import UserError
from pixelgrow.external.pipeline import Pipeline, is_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    (root / "t").mkdir()
    return {
        "text": save_of_text(root / "t"),
        "classes": save_of_classes(root / "classes"),
        "nothing": save_unconditional(root / "nothing"),
    }


@pytest.mark.parametrize(
    ("kind", "given", "nfe"),
    [
        ("text", {"steps": 3, "guidance": 4.0}, 6),
        ("text", {"steps": 3, "guidance": 1.0}, 3),
        ("classes", {"steps": 2, "guidance": 4.0}, 4),
        ("nothing", {"steps": 2}, 2),
    ],
)
def test_images_and_what_they_cost(folders: dict[str, Path], kind: str, given: dict[str, float], nfe: int) -> None:
    pipeline = Pipeline(str(folders[kind]))
    prompts = {"text": ["a red circle", "green"], "classes": ["3", "0"], "nothing": ["", ""]}[kind]
    both, found = pipeline(prompts, [5, 6], 1, given)
    assert (pipeline.conditions, tuple(both.shape), found) == (kind, (2, 3, SIDE, SIDE), nfe)
    assert 0 <= both.min() < both.max() <= 1
    alone, _ = pipeline(prompts[1:], [6], 1, given)
    assert torch.allclose(alone[0], both[1], atol=1e-5)  # a function of its number, not of its place
    other, _ = pipeline(prompts[1:], [6], 2, given)
    assert not torch.allclose(other[0], both[1], atol=1e-2)


def test_parameters_are_those_of_the_network_and_of_all(folders: dict[str, Path]) -> None:
    pipeline = Pipeline(str(folders["text"]))
    network = sum(p.numel() for p in pipeline.model.unet.parameters())
    rest = sum(p.numel() for m in (pipeline.model.vae, pipeline.model.text_encoder) for p in m.parameters())
    assert pipeline.parameters == {"network": network, "all": network + rest}
    assert pipeline.class_name == "StableDiffusionPipeline"


def test_the_hash_is_of_the_weights_not_of_the_place(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(folders["nothing"], tmp_path / "moved")
    first = Pipeline(str(folders["nothing"])).sha256
    assert Pipeline(str(moved)).sha256 == first
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert Pipeline(str(moved)).sha256 != first


def test_mistakes(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(name: str) -> str:
        with pytest.raises(UserError) as error:
            Pipeline(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.raises(UserError, match="takes no guidance: expected steps; drop it"):
        Pipeline(str(folders["nothing"])).check({"guidance": 2.0})
    with pytest.raises(UserError, match="takes no threshold"):
        Pipeline(str(folders["text"])).check({"threshold": 0.9})
    (tmp_path / "empty").mkdir()
    assert "expected a folder with model_index.json" in line(str(tmp_path / "empty"))
    assert not is_pipeline(tmp_path / "empty") and is_pipeline(folders["text"])
    assert "cannot be fetched from the hub" in line("nobody/nothing")  # the tests are offline
    broken = shutil.copytree(folders["nothing"], tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be loaded" in line(str(broken))
    (broken / "model_index.json").write_text("{}")
    assert "cannot be read (KeyError)" in line(str(broken))


def test_a_pipeline_that_needs_an_image_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def call(self: object, image: object, prompt: str | None = None) -> None: ...

    monkeypatch.setattr(diffusers.DDPMPipeline, "__call__", call)
    with pytest.raises(UserError, match="needs image beside a prompt"):
        Pipeline(str(folders["nothing"]))
