"""Stages in latents: the data are encoded and the samples decoded by an autoencoder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import RunCli
from pixelgrow import checkpoint
from pixelgrow.data.images import BadImage
from pixelgrow.data.loader import Loader, to_tensor
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.sources import latents as cached
from pixelgrow.data.sources.latents import Latents
from pixelgrow.data.sources.opening import open_source
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling import generate, sample
from pixelgrow.errors import UserError
from pixelgrow.external.autoencoder import STD, Autoencoder
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.model import Model
from pixelgrow.models.config import PIXELS, NetConfig, Space
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.pairs import Pairs
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.recipe.stages import RESERVED
from pixelgrow.run import run
from pixelgrow.stages import distill, grow, looks, train
from test_growth import CORE, cond

diffusers = pytest.importorskip("diffusers")
FACTOR, CHANNELS = 2, 4


def save_autoencoder(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Save a tiny autoencoder of random weights. Its latents have about the deviation in its configuration."""
    torch.manual_seed(seed)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    with torch.no_grad():
        found = made.encode(to_tensor(images_of(32, 8))).latent_dist.mode()
    made.register_to_config(**{"shift_factor": found.mean().item(), "scaling_factor": 1 / found.std().item()} | changes)
    made.save_pretrained(folder)
    return made


def images_of(side: int, count: int) -> np.ndarray:
    source = Scenes(n=count, captions=count)
    return np.stack([source.image(i, (side, side)) for i in range(count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autoencoder") / "tiny"
    save_autoencoder(path)
    return path


# --- the autoencoder --------------------------------------------------------------------------------------------------


def test_latents_are_the_encoders_means_at_the_deviation_of_pixels(folder: Path) -> None:
    made = Autoencoder(str(folder))
    assert (made.factor, made.space) == (FACTOR, Space(channels=CHANNELS, bounded=False))
    images = to_tensor(images_of(32, 8))
    latents = made.encode(images)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        means = theirs.encode(images).latent_dist.mode()
        want = (means - theirs.config.shift_factor) * theirs.config.scaling_factor * STD
        back = theirs.decode(means).sample.clamp(-1, 1)
    torch.testing.assert_close(latents, want, rtol=1e-4, atol=1e-5)
    assert latents.shape == (8, CHANNELS, 16, 16) and latents.std().item() == pytest.approx(STD, rel=0.02)
    torch.testing.assert_close(made.decode(latents), back, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.encode(images[:3]), latents[:3], rtol=1e-4, atol=1e-5)


def test_autoencoders_differ_by_fingerprint_and_pickle_without_their_weights(folder: Path, tmp_path: Path) -> None:
    made = Autoencoder(str(folder))
    made.encode(torch.zeros(1, 3, 4, 4))
    assert len(pickle.dumps(made)) < 10_000
    save_autoencoder(tmp_path / "repository" / "vae", seed=1)
    other = Autoencoder(str(tmp_path / "repository"))  # as in a repository of a whole pipeline
    assert other.folder.name == "vae" and other.fingerprint != made.fingerprint
    assert Autoencoder(str(folder)).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: (p / "diffusion_pytorch_model.safetensors").unlink(), "is not there: expected a folder of a diffus"),
        (lambda p: (p / "config.json").write_text("{"), "its config.json cannot be read"),
        (lambda p: (p / "config.json").write_text('{"_class_name": "VQModel"}'), "got a VQModel, expected a diffusers"),
        (
            lambda p: (p / "config.json").write_text('{"_class_name": "AutoencoderKL"}'),
            "KeyError: 'block_out_channels'",
        ),
        (lambda p: (p / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), "is cut off"),
    ],
)
def test_what_is_no_autoencoder_is_one_line(change: Any, words: str, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "ae")
    change(tmp_path / "ae")
    with pytest.raises(UserError, match=words) as error:
        Autoencoder(str(tmp_path / "ae")).encode(torch.zeros(1, 3, 4, 4))
    assert "\n" not in str(error.value)


# --- latents of data --------------------------------------------------------------------------------------------------


class Doubling:
    """A simple encoder: the mean of 2x2 pixels in each channel, and the sum of the channels."""

    factor, fingerprint = 2, "0123456789abcdef0123"

    def __init__(self) -> None:
        self.seen = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        small = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([small, small.sum(1, keepdim=True)], 1)


class Damaged(Scenes):
    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        if i == 3:
            raise BadImage("no image")
        return super().image(i, size, crop)


def test_latents_are_made_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "CHUNK", 4)
    source, encoder = Damaged(n=10, captions=5), Doubling()
    seen = Latents(source, encoder, CHANNELS, tmp_path)
    direct = seen.image(5, (8, 8))
    assert direct.shape == (8, 8, CHANNELS) and direct.dtype == np.float32
    seen.make((8, 8))
    assert encoder.seen == 1 + 9  # all except the damaged one
    np.testing.assert_allclose(seen.image(5, (8, 8)), direct, atol=2e-3)  # half precision
    assert encoder.seen == 10
    with pytest.raises(BadImage, match="no image"):
        seen.image(3, (8, 8))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    again = Latents(source, encoder, CHANNELS, tmp_path)
    again.make((8, 8))
    assert encoder.seen == 10 and path.read_bytes() == whole
    path.write_bytes(whole[: int(len(whole) * 0.7)])
    again.make((8, 8))
    assert encoder.seen == 10 + 6 and path.read_bytes() == whole  # the first four are kept


def test_a_loader_of_latents_does_not_change_them(tmp_path: Path) -> None:
    seen = Latents(Scenes(n=12, captions=6), Doubling(), CHANNELS, tmp_path)
    loader = Loader(seen, size=(8, 8), batch=4, random_crop=True)
    batch = next(loader.batches())
    assert batch.image.shape == (4, CHANNELS, 8, 8) and batch.image.dtype == torch.float32
    source, item = loader.order.at(0).source, loader.order.at(0).item
    assert source == 0
    np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), seen.image(item, (8, 8)))
    assert sorted(loader.texts()) == sorted({seen.text(i) for i in range(6)})


def test_a_loader_of_latents_uses_all_captions_of_an_image(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(images_of(16, 2)[i]).save(tmp_path / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": [f"first {i}", {"text": f"second {i}", "weight": 3}]} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = open_source(str(tmp_path))
    seen = Loader(Latents(folder, Doubling(), CHANNELS, tmp_path / "latents"), size=(8, 8), batch=16, seed=3)
    plain = Loader(folder, size=(16, 16), batch=16, seed=3)
    assert seen.several and set(seen.texts()) == {f"{which} {i}" for which in ("first", "second") for i in range(2)}
    assert next(seen.batches()).text == next(plain.batches()).text


# --- networks of another space ----------------------------------------------------------------------------------------


def latent_config(resolution: int = 16) -> NetConfig:
    space = Space(channels=CHANNELS, bounded=False)
    return shallow_uvit("tiny", resolution, core=CORE, space=space)


def random_(net: UViT) -> UViT:
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def test_a_network_without_a_space_is_one_of_pixels() -> None:
    config = shallow_uvit("tiny", 16, core=CORE)
    assert config.space == PIXELS
    old = json.loads(config.model_dump_json(exclude={"space"}))
    assert NetConfig.model_validate(old) == config


def test_growth_keeps_the_space_and_latents_are_not_clipped() -> None:
    net = random_(UViT(latent_config()))
    grown, _ = grow_network(net, grown_config(net.config, 32, "preserve"), "preserve")
    assert grown.config.space == net.config.space
    found = sample(Denoiser(grown).eval(), cond(2), size=(32, 32), steps=2, sampler="ddpm")
    assert found.images.shape == (2, CHANNELS, 32, 32) and found.images.abs().max() > 1
    high, _ = grow_network(net, grown_config(net.config, 32, "preserve", generator=True), "preserve")
    one = generate(Generator(high).eval(), cond(2), size=(32, 32))
    assert one.images.shape == (2, CHANNELS, 32, 32) and one.images.abs().max() > 1
    with pytest.raises(UserError, match="latents are not bounded"):
        sample(Denoiser(grown), cond(1), size=(32, 32), steps=2, threshold=0.9)


# --- a whole run ------------------------------------------------------------------------------------------------------

FEW: dict[str, Any] = {"batch": 8, "snapshot_every": 0, "validate_every": 16, "sample_every": 16}
STAGES: list[dict[str, Any]] = [
    {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 32, "lr": 1e-3} | FEW},
    {"grow": {"name": "grown", "to": 32, "images": 16} | FEW},
    {"evaluate": {"name": "eval", "prompts": 4, "steps": 2}},
    {"pairs": {"name": "pairs", "from": "core", "n": 16, "batch": 8, "shard": 8, "steps": 3}},
    {"distill": {"name": "onestep", "from": "core", "pairs": "pairs", "images": 16} | FEW},
    {"grow": {"name": "onestep32", "from": "onestep", "pairs": "pairs", "to": 32, "images": 16} | FEW},
    {"evaluate": {"name": "eval-onestep", "prompts": 4}},
]


def recipe(autoencoder: Path | None, stages: list[dict[str, Any]], name: str = "latent") -> Recipe:
    data = {"source": "scenes", "n": 24, "captions": 12}
    held = {"source": "scenes", "split": "heldout", "n": 8, "captions": 8}
    raw: dict[str, Any] = {"name": name, "data": data, "heldout": held, "stages": stages}
    raw |= {"latent": {"autoencoder": str(autoencoder)}} if autoencoder else {}
    return read_recipe(raw | {"text": {"encoder": "minilm", "max_tokens": 16}}, "latent.yaml")


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in latents."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (train, "WATCHED", 4),
            (distill, "WATCHED", 8),
            (grow, "WATCHED", 4),
            (looks, "GRID_STEPS", 2),
            (looks, "GRID", 4),
        ):
            patch.setattr(module, name, value)
        run(recipe(folder, STAGES), root)
    return root / "latent"


def test_every_stage_works_in_latents(made: Path, folder: Path) -> None:
    assert len(list((made / "latents").iterdir())) == 2 and "latents" in RESERVED  # at 16 and at 32
    assert Pairs(made / "pairs").latents.shape == (16, CHANNELS, 16, 16)
    for name, objective in (("core", "denoise"), ("grown", "denoise"), ("onestep32", "generate")):
        config = checkpoint.read_config(made / name / "checkpoint")
        assert config.latent["autoencoder"] == str(folder) and config.objective == objective
        assert config.network.space == Space(channels=CHANNELS, bounded=False)
    for name in ("eval", "eval-onestep"):
        metrics = json.loads((made / name / "metrics.json").read_text())
        assert "accuracy" in metrics and (made / name / "samples" / "grid.png").exists()


def test_samples_are_decoded(made: Path, run_cli: RunCli, tmp_path: Path) -> None:
    for name in ("grown", "onestep32"):
        model = Model.from_pretrained(made / name)
        settings = {"steps": 2} if name == "grown" else {}
        (image,) = model.sample("a red circle", seed=1, **settings)
        assert image.size == (64, 64)
        (wide,) = model.sample("a red circle", size=(32, 64), **settings)
        assert wide.size == (64, 32)
        with pytest.raises(UserError, match="size 36x64 does not fit: both sides are multiples of 16; "):
            model.sample("a red circle", size=(36, 64), **settings)
    done = run_cli("sample", made / "onestep32", "a blue star", "-o", tmp_path / "one.png")
    assert done.code == 0 and (tmp_path / "one.png").exists()
    shown = run_cli("info", made / "onestep32")
    assert "resolutions are sides of latents" in shown.out
    grown = run_cli("grow", made / "core", "--to", "32", "-o", tmp_path / "grown", "--data", "scenes")
    assert grown.code == 0 and Model.from_pretrained(tmp_path / "grown").autoencoder is not None


def test_another_space_is_refused(made: Path, tmp_path: Path) -> None:
    more = [{"train": {"name": "more", "from": f"{made / 'core'}/", "images": 8, "batch": 8}}]
    with pytest.raises(UserError, match=r"makes latents of .*, the recipe says pixels"):
        run(recipe(None, more), tmp_path)
    save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"makes latents of .*, the recipe says latents of"):
        run(recipe(tmp_path / "other", more, "other"), tmp_path)
    flip = [{"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "batch": 8, "flip": True}}]
    with pytest.raises(UserError, match="flip mirrors images, but each image is encoded to latents once"):
        run(recipe(tmp_path / "other", flip, "flip"), tmp_path)
