"""Feature extractors: the real one on real photographs, the others with random weights against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
import transformers
from PIL import Image
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.features import NAMES, Extractor, NetworkExtractor, Preparation, load_extractor
from pixelgrow.external import efficientnet, hub, inception, published
from pixelgrow.external.published import Published

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
TOKENS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
TRANSFORMER = TOKENS | dict(intermediate_size=32)
MAPS = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
CONFIGS: dict[str, dict[str, Any]] = {
    "Dinov2Model": TOKENS | dict(mlp_ratio=2),
    "ViTModel": TRANSFORMER,
    "ViTMAEModel": TRANSFORMER,
    "SiglipVisionModel": TRANSFORMER,
    "CLIPVisionModel": TRANSFORMER,
    "ConvNextV2Model": MAPS | dict(patch_size=2),
    "ResNetModel": MAPS | dict(embedding_size=8),
}


def save(folder: Path, kind: str, **options: Any) -> Any:
    """Save a tiny vision model with random weights and the settings of its image processor; returns it."""
    torch.manual_seed(5)
    config = getattr(transformers, kind.removesuffix("Model") + "Config")(**CONFIGS[kind])
    model = getattr(transformers, kind)(config, **options)
    model.save_pretrained(folder)
    return save_processor(folder, model, 32 if "hidden_sizes" in CONFIGS[kind] else 8)


def save_clip(folder: Path) -> Any:
    """Save a tiny CLIP with both halves, without a tokenizer; returns it."""
    torch.manual_seed(6)
    small = {k: v for k, v in TRANSFORMER.items() if k not in ("image_size", "patch_size")}
    config = transformers.CLIPConfig(
        text_config=small | dict(vocab_size=20, bos_token_id=1, eos_token_id=2), vision_config=TRANSFORMER,
        projection_dim=12,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    model.save_pretrained(folder)
    return save_processor(folder, model, 8)


def save_processor(folder: Path, model: Any, side: int) -> Any:
    size = {"height": side, "width": side}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "size": size}))
    return model.eval()


def images_of(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def photograph(name: str) -> Tensor:
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def lite() -> Extractor:
    return load_extractor("efficientnet-lite0")


# --- EfficientNet-Lite0 on real photographs ---------------------------------------------------------------------------


def test_a_cat_is_a_cat_and_coffee_is_coffee(lite: Extractor) -> None:
    """Classes of ImageNet: 281 tabby, 282 tiger cat, 285 Egyptian cat; 967 espresso."""
    for name, classes in (("chelsea", {281, 282, 285}), ("coffee", {967})):
        features, logits = lite(photograph(name))
        assert logits is not None and features.shape == (1, 1280) and logits.shape == (1, 1000)
        assert logits.argmax().item() in classes
        assert logits.softmax(1)[0, list(classes)].sum() > 0.8


def test_small_and_blurred_cats_are_closer_to_the_cat_than_coffee_is(lite: Extractor) -> None:
    cat = photograph("chelsea")
    small = torch.nn.functional.interpolate(cat.float(), (150, 220), mode="bicubic", antialias=True)
    cats, coffee = (lite(x).features for x in (cat, photograph("coffee")))
    near = lite(small.clamp(0, 255).round().byte()).features
    assert torch.dist(cats, near) < torch.dist(cats, coffee) / 3


@pytest.mark.parametrize("together", [1, 4])
def test_a_feature_depends_on_its_image_alone(lite: Extractor, together: int) -> None:
    assert isinstance(lite, NetworkExtractor)
    images, some = images_of(6, 40, 30), replace(lite, together=together)
    whole, threads = some(images), torch.get_num_threads()
    order = [4, 1, 5, 0, 2, 3]
    parts = [some(images[order][:1]), some(images[order][1:6]), some(images[:0])]
    try:
        torch.set_num_threads(3)
        parts.append(some(images))
    finally:
        torch.set_num_threads(threads)
    assert whole.logits is not None
    got = torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts if p.logits is not None])
    if together == 1:
        assert torch.equal(got[0][6:], whole.features) and torch.get_num_threads() == threads
    torch.testing.assert_close(got[0][6:], whole.features)
    assert torch.equal(got[0][:6], whole.features[order]) and torch.equal(got[1][:6], whole.logits[order])
    assert whole.features.device.type == "cpu" and whole.features.dtype == torch.float32
    assert not whole.features.requires_grad


@pytest.mark.parametrize(("together", "passes"), [(4, [4, 4]), (1, [1] * 6)])
def test_passes_are_of_one_size_in_float32_without_gradients(
    lite: Extractor, monkeypatch: pytest.MonkeyPatch, together: int, passes: list[int]
) -> None:
    assert isinstance(lite, NetworkExtractor)
    seen, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def run(x: Tensor) -> tuple[Tensor, None]:
        assert not torch.backends.cudnn.allow_tf32 and not torch.is_grad_enabled()
        assert together > 1 or (threads and set(threads) == {1})
        seen.append(len(x))
        return x.mean((2, 3)), None

    images = images_of(6, 224, 224)
    features, logits = replace(lite, run=run, classes=0, width=3, together=together)(images)
    torch.testing.assert_close(features, (images.float().mean((2, 3)) - 127) / 128)
    assert logits is None and seen == passes and torch.backends.cudnn.allow_tf32


# --- what is done to images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 17), (8, 8), (5, 40)])
def test_images_are_resized_as_pillow_does_without_rounding(size: tuple[int, int]) -> None:
    images = images_of(1, *size) // 128 * 255  # of black and white, so that a cubic filter overshoots
    got = Preparation(8, (10.0, 20.0, 30.0), (2.0, 3.0, 4.0))(images)[0]
    for channel, (mean, std) in enumerate(((10, 2), (20, 3), (30, 4))):
        plane = Image.fromarray(images[0, channel].numpy().astype(np.float32))
        small = np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC)).clip(0, 255)
        torch.testing.assert_close(got[channel], torch.from_numpy((small - mean) / std), rtol=0, atol=1e-3)


def test_identity_is_all_but_the_name(lite: Extractor) -> None:
    assert isinstance(lite, NetworkExtractor)
    said = lite.describe()
    assert json.loads(json.dumps(said)) == said
    assert (
        said | {"name": "efficientnet-lite0", "weights": efficientnet.SHA256, "side": 224, "resize": "bicubic"} == said
    )
    assert said | {"antialias": True, "range": [0, 255], "rounding": "none", "mean": [127.0] * 3, "width": 1280} == said
    prepared = lite.preparation
    others = [
        replace(lite, preparation=replace(prepared, **change))
        for change in (
            {"antialias": False},
            {"resize": "bilinear of TensorFlow 1"},
            {"side": 225},
            {"mean": (1.0,) * 3},
        )
    ]
    others += [replace(lite, layer="another"), replace(lite, weights="0"), replace(lite, network="another")]
    assert len({lite.identity, *(other.identity for other in others)}) == 8
    assert replace(lite, name="another", together=9).identity == lite.identity
    image = images_of(1, 448, 448)
    for other in others[:2]:  # the settings do what they say
        assert not torch.allclose(other(image).features, lite(image).features, atol=1e-3)
    every_other = replace(prepared, resize="bilinear of TensorFlow 1", mean=(0.0,) * 3, std=(1.0,) * 3)(image)
    assert torch.equal(every_other, image[..., ::2, ::2].float())


# --- other networks, random weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "layer"),
    [
        ("Dinov2Model", {}, "pooler_output"),
        ("ViTModel", {}, "pooler_output"),
        ("ViTModel", {"add_pooling_layer": False}, "class token"),
        ("ViTMAEModel", {}, "class token"),
        ("SiglipVisionModel", {}, "pooler_output"),
        ("CLIPVisionModel", {}, "pooler_output"),
        ("ConvNextV2Model", {}, "pooler_output"),
        ("ResNetModel", {}, "pooler_output"),
    ],
)
def test_features_are_what_transformers_gives(tmp_path: Path, kind: str, options: dict[str, Any], layer: str) -> None:
    model = save(tmp_path, kind, **options)
    ours = load_extractor(str(tmp_path))
    side = ours.describe()["side"]
    images = images_of(2, side, side)
    if kind == "ViTMAEModel":
        model.config.mask_ratio = 0.0
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        seen = model(pixel_values=(images / 255 - mean) / std)
    want = seen.last_hidden_state[:, 0] if layer == "class token" else seen.pooler_output.flatten(1)
    got = ours(images)
    torch.testing.assert_close(got.features, want, rtol=1e-4, atol=1e-5)
    assert got.logits is None and ours.width == want.shape[1] and ours.describe()["layer"] == layer
    assert ours.describe()["weights"] == hub.sha256_of([tmp_path / "model.safetensors"])


def test_of_a_clip_the_embedding_of_unit_length_is_the_feature(tmp_path: Path) -> None:
    model, images = save_clip(tmp_path), images_of(3, 8, 8)
    ours = load_extractor(str(tmp_path))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        want = model.visual_projection(model.vision_model((images / 255 - mean) / std).pooler_output)
    torch.testing.assert_close(ours(images).features, torch.nn.functional.normalize(want))
    assert ours.width == 12 and ours.describe()["layer"] == "embedding, of unit length"


def test_tokens_without_a_class_token_are_averaged(tmp_path: Path) -> None:
    model = save(tmp_path, "SiglipVisionModel")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_use_head": False}))
    ours, images = load_extractor(str(tmp_path)), images_of(1, 8, 8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        want = model(pixel_values=(images / 255 - mean) / std).last_hidden_state.mean(1)
    torch.testing.assert_close(ours(images).features, want, rtol=1e-4, atol=1e-5)


def test_inception_runs_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(inception.InceptionV3().state_dict(), file)
    with pytest.raises(UserError, match=r"extractor inception: .*weights.pth has SHA-256 .* it is another file"):
        load_extractor(str(file))
    monkeypatch.setattr(inception, "SHA256", hub.sha256_of([file]))
    ours, images = load_extractor(str(file)), images_of(2, 150, 299)
    network = inception.load(file)
    features, logits = ours(images)
    with torch.no_grad():
        want = network((inception.resize(images[1:].float(), 299) - 128) / 128)
    assert logits is not None and logits.shape == (2, 1008) and features.shape == (2, 2048)
    torch.testing.assert_close(features[1:], want[0])
    torch.testing.assert_close(logits[1:], want[1])
    said = ours.describe()
    assert said | {"name": "inception", "side": 299, "resize": "bilinear of TensorFlow 1", "antialias": False} == said


# --- names and hashes -------------------------------------------------------------------------------------------------


@pytest.fixture
def short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make `dinov2` mean a tiny model in a hub cache of this test, at some revision; returns the model's folder."""

    def make(revision: str, **fields: Any) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        folder = tmp_path / "models--some--dino" / "snapshots" / revision
        save(folder, "Dinov2Model")
        sha256 = fields.pop("sha256", hub.sha256_of([folder / "model.safetensors"]))
        monkeypatch.setitem(published.PUBLISHED, "dinov2", Published("some/dino", revision, sha256, **fields))
        return folder

    return make


def test_published_weights_load_by_name_and_hash(short_name: Callable[..., Path]) -> None:
    folder = short_name("a" * 40)
    named, placed = load_extractor("dinov2"), load_extractor(str(folder))
    assert named.identity == placed.identity and named.name == "dinov2"
    assert named.describe() == placed.describe() | {"name": "dinov2"}
    images = images_of(2, 20, 20)
    assert torch.equal(named(images).features, placed(images).features)
    assert load_extractor(f"some/dino@{'a' * 40}").identity == named.identity


def test_a_published_hash_that_is_not_met_is_one_line(short_name: Callable[..., Path]) -> None:
    short_name("b" * 40, sha256="0" * 64)
    with pytest.raises(
        UserError, match=r"vision model 'dinov2': .*has SHA-256 .*, expected 000.*: fetch it again"
    ) as error:
        load_extractor("dinov2")
    assert "\n" not in str(error.value)


def test_weights_that_are_published_as_a_pickle_are_read_after_their_hash(short_name: Callable[..., Path]) -> None:
    folder = short_name("c" * 40)
    want = load_extractor("dinov2")(images_of(1, 8, 8)).features
    torch.save(dict(transformers.Dinov2Model.from_pretrained(folder).state_dict()), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    short_name_again = Published(
        "some/dino", "c" * 40, hub.sha256_of([folder / "pytorch_model.bin"]), "pytorch_model.bin"
    )
    published.PUBLISHED["dinov2"] = short_name_again
    ours = load_extractor("dinov2")
    assert torch.equal(ours(images_of(1, 8, 8)).features, want)
    assert ours.describe()["weights"] == short_name_again.sha256
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 of something else")
    with pytest.raises(UserError, match=r"pytorch_model\.bin has SHA-256"):
        load_extractor("dinov2")
    with pytest.raises(UserError, match=r"no model\.safetensors .*pickled weights are not read"):
        load_extractor(str(folder))


def test_published_names_have_revisions_and_hashes() -> None:
    assert set(NAMES) == {"efficientnet-lite0", "inception", *published.PUBLISHED}
    for name, model in published.PUBLISHED.items():
        assert hub.is_repository(model.place)
        if name != "convnext":  # none at hand to verify
            assert len(model.revision) == 40 and len(model.sha256) == 64


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "inceptoin",
            "extractor 'inceptoin' is unknown: expected efficientnet-lite0, inception, dinov2, clip, clip-336,",
        ),
        ("./nowhere", "extractor './nowhere' is unknown: expected"),
        ("", "extractor '' is unknown: expected"),
        ("dinov2", "vision model 'facebook/dinov2-large' is not on this machine and cannot be fetched"),
        ("clip-336", "check the spelling and the network; efficientnet-lite0 needs no network"),
        ("nobody/has-this@main", "vision model 'nobody/has-this' is not on this machine and cannot be fetched"),
        ("inception", "extractor inception: weights-inception-2015-12-05-6726825d.pth is not on this machine"),
        ("nowhere.pth", "cannot read nowhere.pth: No such file"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_extractor(name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_text_model_is_no_extractor(tmp_path: Path) -> None:
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path)
    save_processor(tmp_path, torch.nn.Identity(), 8)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_extractor(str(tmp_path))
    assert "\n" not in str(error.value)
