"""Feature networks from outside: vision models, LPIPS and CLIP, as distances and under a discriminator, in a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from diffusion.test_generator import generator
from onestep.test_distill import Conditions, batch
from pixelgrow import checkpoint
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.errors import UserError
from pixelgrow.external import vision
from pixelgrow.external.vision import describe, load_clip, load_vision
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.onestep.distill import DISCRIMINATOR, GENERATOR, DistillObjective
from pixelgrow.onestep.features import FeatureDistance, TeacherFeatures, VisionFeatures, cropped
from pixelgrow.onestep.losses import feature_distance, similarity_loss
from pixelgrow.onestep.networks import ClipSimilarity, load_networks, networks_used
from pixelgrow.onestep.settings import LossSettings, SimilaritySettings
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.stages import distill, train
from test_growth import cond, shallow
from text_models import save_clip

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
PROCESSOR = {"image_mean": MEAN, "image_std": STD}


def save_vision(folder: Path, kind: str, processor: dict[str, Any] | None = None) -> Any:
    """Save a tiny vision model with random weights and its image processor's settings; returns the model."""
    torch.manual_seed(2)
    small = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    maps = dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    config: dict[str, Any] = {
        "Dinov2": small | dict(image_size=28, patch_size=4, mlp_ratio=2),  # trained at 28, asked at `side`
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


def pictures(n: int, side: int) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


# --- vision models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Dinov2", "CLIPVision", "ViT", "ConvNext", "ResNet"])
def test_features_are_the_models_hidden_states(tmp_path: Path, kind: str) -> None:
    side = 32 if kind in ("ConvNext", "ResNet") else 8
    model = save_vision(tmp_path, kind, PROCESSOR | {"size": {"height": side, "width": side}})
    ours = load_vision(str(tmp_path))
    images = pictures(2, side).requires_grad_()
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


def test_of_a_clip_with_both_halves_the_image_half_is_asked(tmp_path: Path) -> None:
    ours = load_vision(str(save_both(tmp_path)))
    assert ours.widths == [16] and not hasattr(ours.model, "text_model")
    assert ours.spec.side == 8  # what is cropped, not what is resized before


@pytest.mark.parametrize("side", [8, 32, 20, 5])
def test_pictures_are_resized_as_pillow_does_and_normalised(tmp_path: Path, side: int) -> None:
    save_vision(tmp_path, "ViT")
    images = pictures(1, side)
    got = describe(str(tmp_path)).prepare(images)[0]
    for channel in range(3):
        plane = Image.fromarray(((images[0, channel] + 1) / 2).numpy())
        small = np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC))
        want = (torch.from_numpy(small.copy()) - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(got[channel], want, rtol=0, atol=2e-5)


def test_a_teachers_features_are_its_cores_tokens_while_it_denoises() -> None:
    """At the noise level 0.3 of the core, which is 0.3 k in images that the teacher's levels pool k times."""
    low = shallow()
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "random"), "random")
    teacher = Denoiser(net, low.config).eval()
    images, c, tokens = pictures(2, 32), cond(2), []
    hooks = [block.register_forward_hook(lambda *found: tokens.append(found[2])) for block in net.core.blocks]
    with torch.no_grad():
        teacher(images, torch.full((2,), 0.3 * 2), c)
    for hook in hooks:
        hook.remove()
    features = TeacherFeatures(teacher)
    seen = features(images, c, torch.zeros(2, 2))
    assert len(seen.tokens) == len(features.layers)
    for got, number in zip(seen.tokens, features.layers, strict=True):
        torch.testing.assert_close(got, tokens[number - 1])


def test_large_pictures_are_seen_twice_and_the_teacher_embeds_the_condition(tmp_path: Path) -> None:
    save_vision(tmp_path, "ViT")
    teacher = TeacherFeatures(shallow())
    features = VisionFeatures(load_vision(str(tmp_path)), teacher)
    images, crop, c = pictures(2, 16), torch.tensor([[0.0, 0.9], [0.5, 0.2]]), cond(2)
    seen = features(images, c, crop)
    assert [t.shape[-1] for t in seen.tokens] == features.widths(16) == 2 * features.widths(8)
    part = features(cropped(images, 8, crop), c, crop)
    for got, want in zip(seen.tokens[3:], part.tokens, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(seen.vec, teacher(images, c, crop).vec) and features.vec_width == seen.vec.shape[1]


def test_a_generator_learns_by_a_vision_model_whose_layers_differ_in_width(tmp_path: Path) -> None:
    save_vision(tmp_path, "ConvNext", PROCESSOR | {"size": 16})
    made, teacher = generator(), TeacherFeatures(shallow())
    losses = LossSettings(distance=str(tmp_path), discriminator=str(tmp_path), pixels=0.0)
    networks = load_networks(losses, teacher)
    assert (
        isinstance(networks.distance, FeatureDistance) and networks.distance.features is networks.features
    )  # loaded once
    objective = DistillObjective(
        made, networks.features, Conditions(), losses, 0, networks.distance, networks.similarity
    )
    assert [head.down.in_features for head in objective.discriminator.heads] == [8, 24, 32]
    some = batch(4, 16)
    optimizers = {part: torch.optim.Adam(m.parameters(), 1e-3) for part, m in objective.modules.items()}
    rec = []
    for _ in range(12):
        for part, optimizer in optimizers.items():
            optimizer.zero_grad()
            terms = objective.loss(some, part)
            terms.loss.backward()
            optimizer.step()
            if part == GENERATOR:
                rec.append(float(terms.logs["rec"]))
    assert rec[-1] < 0.8 * rec[0]
    assert all(p.grad is not None for p in objective.modules[DISCRIMINATOR].parameters())


def test_the_teacher_judges_by_default() -> None:
    teacher = TeacherFeatures(shallow())
    networks = load_networks(LossSettings(), teacher)
    assert networks.features is teacher and networks.similarity is None and networks_used(LossSettings()) == {}
    assert isinstance(networks.distance, FeatureDistance) and networks.distance.features is teacher


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def test_without_the_extra_lpips_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    for use in (networks_used, lambda losses: load_networks(losses, TeacherFeatures(shallow()))):
        with pytest.raises(UserError, match=r"install pixelgrow\[lpips\], or write distance: teacher") as error:
            use(LossSettings(distance="lpips"))
        assert "\n" not in str(error.value)
    assert networks_used(LossSettings(distance="lpips", features=0)) == {}


class FakeLpips(torch.nn.Module):
    """As the package's: images in [-1, 1] -> (B, 1, 1, 1); here the squared difference of their means."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg" and not verbose
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[-2:] == b.shape[-2:] and min(a.shape[-2:]) >= 224
        return self.weight * (a.mean((1, 2, 3), keepdim=True) - b.mean((1, 2, 3), keepdim=True)).square()


def test_lpips_is_a_distance_of_the_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=FakeLpips))
    monkeypatch.setattr(vision, "version", lambda name: "0.1.4")
    losses = LossSettings(distance="lpips", adversarial=False, features=2.0, pixels=0.0)
    assert networks_used(losses) == {"distance": "lpips 0.1.4"}
    networks = load_networks(losses, TeacherFeatures(shallow()))
    a = torch.tensor([0.5, -0.25])[:, None, None, None].expand(2, 3, 16, 16).clone().requires_grad_()
    got = networks.distance(a, torch.zeros(2, 3, 16, 16), cond(2), torch.zeros(2, 2))
    torch.testing.assert_close(got, torch.tensor([0.25, 0.0625]))
    got.sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad.sum((1, 2, 3)), torch.tensor([1.0, -0.5]))
    made, some = generator(), batch(2, 16)
    objective = DistillObjective(made, networks.features, Conditions(), losses, 0, networks.distance)
    drawn = made(some.latent, cond(2))
    want = 2 * (drawn.mean((1, 2, 3)) - some.target.mean((1, 2, 3))).square().mean()
    torch.testing.assert_close(objective.loss(some, GENERATOR).loss, want)


# --- CLIP's similarity ------------------------------------------------------------------------------------------------


def test_similarity_loss_is_one_minus_the_cosine() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [5.0, 5.0]])
    assert similarity_loss(a, b).item() == pytest.approx(0.5)
    assert similarity_loss(a, -a).item() == pytest.approx(2)


def test_similarity_is_clips_own(tmp_path: Path) -> None:
    clip = load_clip(str(save_both(tmp_path)))
    whole = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red circle", "two blue stars below a circle , and far more words than twenty tokens " * 3]
    images = pictures(2, 16)
    with torch.no_grad():
        prepared = clip.spec.prepare(images)
        one = [
            whole(pixel_values=prepared[i : i + 1], **tokenizer(t, truncation=True, max_length=20, return_tensors="pt"))
            for i, t in enumerate(texts)
        ]
    want = 1 - torch.stack([(o.image_embeds * o.text_embeds).sum() for o in one]).mean()
    torch.testing.assert_close(ClipSimilarity(clip)(images, texts), want)


class Few:
    """Conditions of which the first are the same however many are asked for."""

    def cond(self, texts: Any) -> Any:
        return cond(8)[: len(texts)]


@pytest.mark.parametrize("adversarial", [True, False])
def test_similarity_pulls_prior_samples_to_their_captions(tmp_path: Path, adversarial: bool) -> None:
    folder, teacher, some = str(save_both(tmp_path)), TeacherFeatures(shallow()), batch(4, 16)
    found = {}
    for weight in (0.0, 0.5):
        losses = LossSettings(
            adversarial=adversarial, balance="fixed", similarity=SimilaritySettings(model=folder, weight=weight)
        )
        assert list(networks_used(losses)) == (["similarity"] if weight else [])
        networks, made = load_networks(losses, teacher), generator()
        objective = DistillObjective(made, networks.features, Few(), losses, 0, networks.distance, networks.similarity)
        terms = objective.loss(some, GENERATOR)
        terms.loss.backward()
        found[weight] = (terms, made.last_layer.grad, objective)
    (plain, grad, objective), (terms, pulled, _) = found[0.0], found[0.5]
    alike = ClipSimilarity(load_clip(folder))
    made = generator()
    alone = alike(made(objective._prior(some.index, GENERATOR), cond(8)[4:]), some.text)
    (want,) = torch.autograd.grad(alone, made.last_layer)
    torch.testing.assert_close(terms.logs["similarity"], alone.detach())
    torch.testing.assert_close(terms.loss, plain.loss + 0.5 * alone)
    torch.testing.assert_close(pulled, grad + 0.5 * want, rtol=1e-3, atol=1e-6)


# --- mistakes and records ---------------------------------------------------------------------------------------------


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


def test_names_that_mean_no_judge_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision model 'nobody/has-this' is not on this machine and cannot be fetched"):
        describe("nobody/has-this")
    with pytest.raises(
        UserError, match=r"vision model './nope' is not a folder here; expected a folder or a model's name"
    ):
        describe("./nope")
    save_vision(tmp_path, "ViT")
    with pytest.raises(UserError, match="is of type 'vit', expected 'clip'"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("losses", "text", "words"),
    [
        ({"discriminator": "lpips"}, {}, "lpips is a distance; expected teacher, or a vision model's"),
        ({"similarity": {"model": "x/y"}}, {"classes": 2}, "similarity compares pictures with captions, and a recipe"),
        ({"similarity": {"weight": 1}}, {}, "losses.similarity.model is missing"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(losses: dict[str, Any], text: dict[str, Any], words: str) -> None:
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 16}},
        {"pairs": {"name": "pairs", "n": 8}},
        {"distill": {"name": "onestep", "pairs": "pairs", "images": 8, "losses": losses}},
    ]
    with pytest.raises(UserError) as error:
        read_recipe({"name": "x", "text": text, "data": {"source": "scenes"}, "stages": stages}, "x.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_records_who_judged_and_refuses_another(tmp_path: Path) -> None:
    save_vision(tmp_path / "dino", "Dinov2")
    save_both(tmp_path / "clip")
    networks = {
        "distance": str(tmp_path / "dino"),
        "discriminator": str(tmp_path / "clip"),
        "similarity": {"model": str(tmp_path / "clip")},
    }
    whole = load_recipe("smoke-onestep", [f"stages.onestep.losses={json.dumps(networks)}", "stages.core.images=16"])
    recipe = whole.model_copy(update={"stages": whole.stages[:3]})
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, distill):
            patch.setattr(module, "WATCHED", 8)
            patch.setattr(module, "GRID_STEPS", 2)
        run(recipe, tmp_path)
    made = tmp_path / "smoke-onestep" / "onestep"
    model, config = checkpoint.load_generator(made / "checkpoint")
    assert isinstance(model, Generator)
    prints = {name: describe(str(tmp_path / name)).fingerprint for name in ("dino", "clip")}
    assert config.lineage[-1]["networks"] == {
        "distance": f"{tmp_path / 'dino'} {prints['dino']}",
        "discriminator": f"{tmp_path / 'clip'} {prints['clip']}",
        "similarity": f"{tmp_path / 'clip'} {prints['clip']}",
    }
    log = (made / "log.jsonl").read_text()
    assert '"generator/similarity"' in log and '"generator/adv"' in log
    save_vision(tmp_path / "dino", "ViT")
    with pytest.raises(UserError, match="networks"):
        run(recipe, tmp_path)
