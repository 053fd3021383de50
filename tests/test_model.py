"""The model as people use it: the shipped models sample, models are saved and shared, mistakes are one line."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

import pixelgrow
from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.data.scenes.checker import score
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.diffusion.denoiser import Denoiser, NoiseConfig, NoiseSchedule
from pixelgrow.diffusion.sampling import Samples, sample
from pixelgrow.errors import UserError
from pixelgrow.growth import kept_in
from pixelgrow.model import WEIGHTS, Model, builtin, find
from pixelgrow.models.cond import Cond
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.pictures import to_uint8
from pixelgrow.text.encoders import load_encoder

SHIPPED_BYTES = 40_000_000  # all weights together


def untrained(resolution: int = 16, seed: int = 0, encoder: str = "labels:3") -> Model:
    torch.manual_seed(seed)
    core = core_config("tiny", text_dim=8, pooled_dim=8, classes=3)
    denoiser = Denoiser(UViT(shallow_uvit("tiny", resolution, core=core))).eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.05)
    text = {"encoder": encoder, "max_tokens": 8}
    return Model(denoiser, CheckpointConfig(network=denoiser.net.config, diffusion=denoiser.config, text=text))


@pytest.fixture(scope="module")
def tiny() -> Model:
    return pixelgrow.load("tiny")


@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("tiny", ["train", "train", "grow", "cast"]),
        ("tiny-onestep", ["train", "train", "distill", "grow", "cast"]),
        ("emoji", ["train", "train", "train", "grow", "grow", "grow", "cast"]),
    ],
)
def test_what_ships_says_how_it_was_made(name: str, verbs: list[str]) -> None:
    assert name in builtin()
    folder = find(name)
    config = checkpoint.read_config(folder)
    assert [entry["verb"] for entry in config.lineage] == verbs
    assert config.sha256 == checkpoint.file_hash(folder / checkpoint.WEIGHTS)


def test_a_run_or_an_unfinished_stage_names_what_has_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage, record in (("core", '{"done": true}'), ("grown", '{"done": false}'), ("pairs", '{"done": true}')):
        (tmp_path / "runs" / "x" / stage).mkdir(parents=True)
        (tmp_path / "runs" / "x" / stage / "stage.json").write_text(record, encoding="utf-8")
    again = "or run its recipe again to go on"

    def refused(name: str) -> str:
        with pytest.raises(UserError) as error:
            find(name)
        return str(error.value)

    assert refused("runs/x") == f"runs/x is a run: no stage beside it has a model yet, {again}"
    (tmp_path / "runs/x/core/checkpoint").mkdir()
    (tmp_path / "runs/x/core/checkpoint" / checkpoint.CONFIG).write_text("{}", encoding="utf-8")
    assert refused("runs/x/") == f"runs/x is a run: name one of runs/x/core, {again}"
    nothing = "a stage that is not finished and has saved no average yet"
    assert refused("runs/x/grown") == f"runs/x/grown is {nothing}: name one of runs/x/core, {again}"
    assert refused("runs/x/pairs") == "runs/x/pairs is a stage that makes no model: name one of runs/x/core"
    monkeypatch.chdir(tmp_path / "runs/x/grown")
    assert refused(".").endswith(f"name one of {tmp_path / 'runs/x/core'}, {again}")
    assert refused("..").startswith(".. is a run: name one of ../core")
    assert "is not a checkpoint" in refused("../../..")


def test_what_ships_is_small() -> None:
    """Parameters in float16, statistics of the text in float32."""
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*.*")) < SHIPPED_BYTES
    for name in builtin():
        net = pixelgrow.load(name, device="cpu").network.net
        stored = load_file(find(name) / checkpoint.WEIGHTS)
        parameters = dict(net.named_parameters())
        assert all((t.dtype == torch.float16) == (n in parameters) for n, t in stored.items())


@pytest.mark.parametrize(("name", "levels"), [("tiny", 2), ("tiny-onestep", 1)])
def test_images_are_the_same_in_half_precision(name: str, levels: int, tmp_path: Path) -> None:
    """The shipped weights with differences below float16's precision, saved in float16: no pixel differs by more than
    one of 255 grey levels, or two after several steps."""
    exact = pixelgrow.load(name, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in exact.network.net.parameters():  # float16 has 11 bits of precision
        p.data *= 1 + 2**-12 * (2 * torch.rand(p.shape, generator=generator) - 1)
    exact.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = pixelgrow.load(tmp_path / "half", device="cpu")
    more = {} if name == "tiny-onestep" else {"steps": 4}
    prompts = ["a red circle above two blue stars", "three green squares", "a small yellow triangle", "a black cross"]
    a, b = (np.stack([np.asarray(i, int) for i in m.sample(prompts, **more)]) for m in (exact, half))
    assert 1 <= np.abs(a - b).max() <= levels


def test_a_teacher_is_known_by_what_it_was_before_it_was_cast() -> None:
    """tiny-onestep was distilled from the core that tiny grew from, and both were cast at the end."""
    tiny, onestep = (checkpoint.read_config(find(name)) for name in ("tiny", "tiny-onestep"))
    (distilled,) = (entry["parent"] for entry in onestep.lineage if entry["verb"] == "distill")
    grown = tiny.lineage[-1]["parent"]  # as it was before it was cast
    assert kept_in(tiny.lineage) == [grown, distilled]
    assert kept_in(tiny.lineage[:-1]) == [distilled]
    cast = [*tiny.lineage, {"verb": "cast", "dtype": "float16", "parent": tiny.sha256}]
    assert kept_in(cast) == [tiny.sha256, grown, distilled]


def test_the_shipped_model_follows_held_out_captions(tiny: Model) -> None:
    """A few images with few steps: far above chance on what the model is good at, and no claim beyond that."""
    scenes = [Scenes(n=64, captions=64, split="heldout").scene(i) for i in range(12)]
    images = tiny.sample([s.caption for s in scenes], seed=1, steps=16)
    result = score([np.asarray(i) for i in images], [s.questions for s in scenes])
    assert result["background"] >= 0.8 and result["colour"] >= 0.9 and result["shape"] >= 0.7, result


def test_the_shipped_one_step_model_follows_held_out_captions() -> None:
    scenes = [Scenes(n=64, captions=64, split="heldout").scene(i) for i in range(64)]
    images = pixelgrow.load("tiny-onestep").sample([s.caption for s in scenes], seed=1)
    result = score([np.asarray(i) for i in images], [s.questions for s in scenes])
    assert result["background"] >= 0.95 and result["colour"] >= 0.9 and result["relation"] >= 0.9, result
    assert result["shape"] >= 0.75, result


def test_the_shipped_emoji_have_the_colours_and_the_ground_of_their_captions() -> None:
    """With few steps, at 256 px; what they show is judged by `bench.emoji`."""
    model = pixelgrow.load("emoji")
    prompts = {"a green heart": 1, "a blue heart": 2, "a red apple": 0, "a red heart on a blue background": 0}
    images = [np.asarray(image, float) for image in model.sample(list(prompts), steps=12)]
    assert {image.shape for image in images} == {(256, 256, 3)}
    for image, channel in zip(images, prompts.values(), strict=True):
        middle = image[96:160, 96:160].mean((0, 1))
        assert middle[channel] > 1.3 * np.delete(middle, channel).max(), (channel, middle)
    corners = np.stack([image[[8, 8, -8, -8], [8, -8, 8, -8]].mean(0) for image in images])
    assert (corners[:3] > 235).all() and corners[3].argmax() == 2, corners


def test_an_image_does_not_depend_on_the_others_of_its_batch(tiny: Model) -> None:
    prompts = ["a red circle above two blue stars", "three green squares"]
    both = tiny.sample(prompts, seed=3, steps=3)
    alone = tiny.sample(prompts[1], seed=3, steps=3, index=[1])
    difference = np.abs(np.asarray(both[1], int) - np.asarray(alone[0], int))
    assert difference.max() <= 1
    assert both[0].size == (64, 64)
    assert np.any(np.asarray(both[0]) != np.asarray(tiny.sample(prompts[0], seed=4, steps=3)[0]))


def test_many_images_are_streamed_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch's images are freed before the next are made; the images are those of one call of the sampler."""
    live: list[weakref.ref[torch.Tensor]] = []
    sizes, steps, model, prompts = [], [], untrained(), ["0", "1", "2", "1", "0"]
    whole = sample(model.denoiser, model.conditions(prompts), size=(16, 16), seed=2, steps=2, guidance=2.0)

    def watched(denoiser: Denoiser, cond: Cond, **settings: Any) -> Samples:
        assert not [t for t in live if t() is not None]
        made = sample(denoiser, cond, **settings)
        live.append(weakref.ref(made.images))
        sizes.append(len(cond))
        return made

    monkeypatch.setattr("pixelgrow.model.sample", watched)
    stream = model.stream(prompts, seed=2, steps=2, batch=2, progress=lambda *p: steps.append(p))
    assert sizes == []
    pixels = np.stack([np.asarray(image) for image in stream])
    assert np.abs(pixels.astype(int) - to_uint8(whole.images)).max() <= 1
    assert sizes == [2, 2, 1] and steps == [(i, 6) for i in range(1, 7)]
    with pytest.raises(UserError, match="class '7' is unknown"):  # before anything is sampled
        model.stream(["0", "7"], batch=1)


def test_settings_come_from_the_call_then_the_checkpoint_then_the_library() -> None:
    model = untrained()
    assert model.settings()["steps"] == 32
    config = model.config.model_copy(update={"sampling": {"steps": 5, "guidance": 1.5}})
    model = Model(model.denoiser, config)
    assert model.settings(guidance=3.0, steps=None) == {"steps": 5, "guidance": 3.0, "sampler": "dpm++2m"}


def test_a_saved_and_loaded_model_samples_the_same(tmp_path: Path) -> None:
    model = untrained()
    model.save_pretrained(tmp_path / "m")
    back = Model.from_pretrained(tmp_path / "m", device="cpu")
    a, b = (np.asarray(m.sample(["2"], steps=2)[0]) for m in (model, back))
    assert np.array_equal(a, b)


def test_other_sizes_are_height_by_width() -> None:
    assert untrained().sample(["0"], steps=1, size=(8, 24))[0].size == (24, 8)


def test_pushing_uploads_a_whole_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
            seen["repo"] = (repo, private)
            return f"hub/{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert untrained().push_to_hub("me/mine", private=True) == "hub/me/mine"
    assert seen == {"repo": ("me/mine", True), "files": ["README.md", "config.json", "model.safetensors"]}


def test_a_repository_of_the_hub_is_loaded_from_its_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained().save_pretrained(tmp_path / "copy")
    requests = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        requests.append((repo, revision))
        return str(tmp_path / "copy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert pixelgrow.load("somebody/model", device="cpu").resolution == 16
    assert pixelgrow.load("somebody/model@v2", device="cpu").resolution == 16
    assert requests == [("somebody/model", None), ("somebody/model", "v2")]


@pytest.mark.parametrize("kind", ["text", "no text", "the hub's own"])
def test_a_download_that_breaks_off_is_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(HfHubHTTPError.__bases__[0]):  # type: ignore[misc]
        """Like a time-out of the HTTP library that the hub's library uses."""

    error = {"text": OSError("broken\npipe"), "no text": OSError(), "the hub's own": Broken("timed out")}[kind]

    def broken(*_: object, local_files_only: bool = False, **__: object) -> str:
        raise FileNotFoundError if local_files_only else error

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    reason = {"text": "broken", "no text": "OSError", "the hub's own": "timed out"}[kind]
    with pytest.raises(
        UserError, match=f"somebody/model .* cannot be fetched from the hub .{reason}.; check"
    ) as caught:
        pixelgrow.load("somebody/model")
    assert "\n" not in str(caught.value)
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    with pytest.raises(UserError, match="encoder 'somebody/t5' is not on this machine and cannot be fetched"):
        load_encoder("somebody/t5", max_tokens=8)
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # its retries are not lines of ours


def test_unknown_names_are_one_line(tmp_path: Path) -> None:
    for name in ("nothing", str(tmp_path / "none"), "nobody/nothing-here"):
        with pytest.raises(UserError) as caught:
            Model.from_pretrained(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_another_text_encoder_than_in_training_is_one_line() -> None:
    model = untrained()
    text = model.config.text | {"fingerprint": load_encoder("labels:3", max_tokens=8).fingerprint}
    for given, words in (
        (text, None),
        (text | {"fingerprint": "another"}, "is not the one that the model was trained with"),
        ({}, "names no text encoder"),
        ({"encoder": "labels:3"}, "names no text encoder"),
    ):
        other = Model(model.denoiser, model.config.model_copy(update={"text": given}))
        if words is None:
            assert len(other.encode(["1"])) == 1
            continue
        with pytest.raises(UserError, match=words) as caught:
            other.sample(["1"], steps=1)
        assert "\n" not in str(caught.value)


def test_the_grid_of_the_training_noise_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("pixelgrow.model.sample", lambda *_, **k: seen.append(k) or Samples(torch.zeros(1, 3, 8, 8), 1))
    model = untrained()
    with pytest.raises(UserError, match="does not hold the noise"):
        model.sample(["1"], grid="native")
    with pytest.raises(UserError, match="'linear' does not exist; expected 'karras'"):
        model.sample(["1"], grid="linear")
    noise = NoiseConfig(mean=0.3, std=0.7)
    model.config = model.config.model_copy(
        update={"noise": noise, "sampling": {"grid": "native", "interval": [0.2, 3]}}
    )
    model.sample(["1"])
    model.sample(["1"], grid="karras", interval=(0.0, 1.0))
    assert isinstance(seen[0]["grid"], NoiseSchedule) and seen[0]["grid"].config == noise
    assert seen[0]["interval"] == [0.2, 3]
    assert (seen[1]["grid"], seen[1]["interval"]) == ("karras", (0.0, 1.0))


def test_the_training_noise_is_kept_and_may_be_absent(tmp_path: Path) -> None:
    model = untrained()
    model.config = model.config.model_copy(update={"noise": NoiseConfig(kind="interpolated", finest=2)})
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / checkpoint.CONFIG
    assert checkpoint.read_config(path.parent).noise == model.config.noise
    raw = json.loads(path.read_text())
    del raw["noise"]  # as in checkpoints of earlier versions
    path.write_text(json.dumps(raw))
    assert checkpoint.read_config(path.parent).noise is None


def test_calls_that_make_no_sense_are_one_line() -> None:
    model = untrained()
    with pytest.raises(UserError, match="no prompt"):
        model.sample([])
    with pytest.raises(UserError, match="multiples of 4"):
        model.sample(["1"], size=(10, 16))
    with pytest.raises(UserError, match="the guide is a 32 px model"):
        model.sample(["1"], guide=untrained(32))
    with pytest.raises(UserError, match="name a model of the same text encoder"):
        model.sample(["1"], guide=untrained(encoder="labels:4"))


def test_a_guide_whose_text_encoder_lies_elsewhere_has_the_same_text() -> None:
    model, guide = untrained(), untrained(seed=1)
    text = model.config.text | {"fingerprint": load_encoder("labels:3", 8).fingerprint}
    model.config = model.config.model_copy(update={"text": text})
    guide.config = guide.config.model_copy(update={"text": text | {"encoder": "elsewhere/labels"}})
    assert model.sample(["1"], guide=guide, steps=1)
