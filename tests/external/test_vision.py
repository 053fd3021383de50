"""Vision models and CLIP of transformers against transformers itself, and the ways they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.external.vision import describe, load_clip, load_vision
from pixelgrow.onestep.losses import feature_distance
from pixelgrow.onestep.networks import ClipSimilarity
from text_models import save_clip

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
PROCESSOR = {"image_mean": MEAN, "image_std": STD}


def save_vision(folder: Path, kind: str, processor: dict[str, Any] | None = None) -> Any:
    """Save a tiny vision model with random weights and its image processor's settings; returns the model."""
    torch.manual_seed(2)
    small = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    maps = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    config: dict[str, Any] = {
        "Dinov2": small | dict(image_size=28, patch_size=4, mlp_ratio=2),  # trained at 28, given `side`
        "CLIPVision": small | dict(image_size=8, patch_size=4, intermediate_size=32),
        "ViT": small | dict(image_size=8, patch_size=4, intermediate_size=32),
        "ConvNext": maps | dict(patch_size=2),
        "ResNet": maps | dict(embedding_size=8),
    }[kind]
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor or PROCESSOR | {"size": 8, "crop_size": 8}))
    return model.eval()


def save_both(folder: Path) -> Path:
    """Save a tiny CLIP with both halves, its tokenizer and the settings of its image processor."""
    save_clip(folder, whole=True)
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": PROCESSOR | {"size": {"shortest_edge": 12}, "crop_size": {"height": 8}}})
    )
    return folder


def images_of(n: int, side: int) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


# --- features and embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Dinov2", "CLIPVision", "ViT", "ConvNext", "ResNet"])
def test_features_are_the_models_hidden_states(tmp_path: Path, kind: str) -> None:
    side = 32 if kind in ("ConvNext", "ResNet") else 8
    model = save_vision(tmp_path, kind, PROCESSOR | {"size": {"height": side, "width": side}})
    ours = load_vision(str(tmp_path))
    images = images_of(2, side).requires_grad_()
    tokens = ours(images)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        states = model(pixel_values=((images + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    depth = len(states) - 1
    for got, want in zip(tokens, [states[round(depth / 3)], states[round(2 * depth / 3)], states[-1]], strict=True):
        flat = torch.stack([want[..., y, x] for y in range(want.shape[2]) for x in range(want.shape[3])], 1) \
            if want.ndim == 4 else want  # fmt: skip
        torch.testing.assert_close(got, flat)
    assert ours.widths == [t.shape[-1] for t in tokens]
    feature_distance(tokens, [torch.ones_like(t) for t in tokens]).sum().backward()
    assert images.grad is not None and images.grad.abs().amin(1).flatten(1).amax(1).min() > 0
    assert not ours.model.training and not any(p.requires_grad for p in ours.model.parameters())


def test_of_a_clip_with_both_halves_the_image_half_is_used(tmp_path: Path) -> None:
    ours = load_vision(str(save_both(tmp_path)))
    assert ours.widths == [16] and not hasattr(ours.model, "text_model")
    assert ours.spec.side == 8  # what is cropped, not what is resized before


@pytest.mark.parametrize("side", [8, 32, 20, 5])
def test_images_are_resized_as_pillow_does_and_normalised(tmp_path: Path, side: int) -> None:
    save_vision(tmp_path, "ViT")
    images = images_of(1, side)
    got = describe(str(tmp_path)).prepare(images)[0]
    for channel in range(3):
        plane = Image.fromarray(((images[0, channel] + 1) / 2).numpy())
        small = np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC))
        want = (torch.from_numpy(small.copy()) - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(got[channel], want, rtol=0, atol=2e-5)


def test_similarity_is_clips_own(tmp_path: Path) -> None:
    clip = load_clip(str(save_both(tmp_path)))
    whole = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red circle", "two blue stars below a circle , and far more words than twenty tokens " * 3]
    images = images_of(2, 16)
    with torch.no_grad():
        prepared = clip.spec.prepare(images)
        one = [
            whole(pixel_values=prepared[i : i + 1], **tokenizer(t, truncation=True, max_length=20, return_tensors="pt"))
            for i, t in enumerate(texts)
        ]
    want = 1 - torch.stack([(o.image_embeds * o.text_embeds).sum() for o in one]).mean()
    torch.testing.assert_close(ClipSimilarity(clip)(images, texts), want)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"preprocessor_config.json": None}, "no preprocessor_config.json in"),
        ({"preprocessor_config.json": "[]"}, "cannot be read (not a mapping)"),
        ({"preprocessor_config.json": '{"size": 8}'}, "are not an image processor's (KeyError: 'image_mean')"),
        ({"preprocessor_config.json": json.dumps(PROCESSOR | {"size": "large"})}, "are not an image processor's"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"model.safetensors": None}, "no model.safetensors in"),
        ({"model.safetensors": "cut"}, "model.safetensors is cut off"),
    ],
)
def test_a_damaged_vision_model_is_one_line(tmp_path: Path, files: dict[str, str | None], words: str) -> None:
    save_vision(tmp_path, "ViT")
    for name, text in files.items():
        (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_vision(str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_names_of_no_feature_network_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision model 'nobody/has-this' is not on this machine and cannot be fetched"):
        describe("nobody/has-this")
    with pytest.raises(
        UserError, match=r"vision model './nope' is not a folder here; expected a folder or a model's name"
    ):
        describe("./nope")
    save_vision(tmp_path, "ViT")
    with pytest.raises(UserError, match="is of type 'vit', expected 'clip'"):
        load_clip(str(tmp_path))
