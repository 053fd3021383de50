"""Feature networks from outside: vision models, LPIPS and CLIP, as distances and under a discriminator, in a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.test_generator import generator
from external.test_vision import PROCESSOR, images_of, save_both, save_vision
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
from pixelgrow.onestep.losses import similarity_loss
from pixelgrow.onestep.networks import ClipSimilarity, load_networks, networks_used
from pixelgrow.onestep.settings import LossSettings, SimilaritySettings
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.stages import distill, looks, train
from test_growth import cond, shallow

# --- teachers and vision models ---------------------------------------------------------------------------------------


def test_a_teachers_features_are_its_cores_tokens_while_it_denoises() -> None:
    """At the noise level 0.3 of the core, which is 0.3 k in images that the teacher's levels pool k times."""
    low = shallow()
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "random"), "random")
    teacher = Denoiser(net, low.config).eval()
    images, c, tokens = images_of(2, 32), cond(2), []
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


def test_large_images_give_two_views_and_the_teacher_embeds_the_condition(tmp_path: Path) -> None:
    save_vision(tmp_path, "ViT")
    teacher = TeacherFeatures(shallow())
    features = VisionFeatures(load_vision(str(tmp_path)), teacher)
    images, crop, c = images_of(2, 16), torch.tensor([[0.0, 0.9], [0.5, 0.2]]), cond(2)
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


def test_the_teachers_features_are_the_default() -> None:
    teacher = TeacherFeatures(shallow())
    networks = load_networks(LossSettings(), teacher)
    assert networks.features is teacher and networks.similarity is None and networks_used(LossSettings()) == {}
    assert isinstance(networks.distance, FeatureDistance) and networks.distance.features is teacher


def test_feature_networks_are_known_by_name_and_fingerprint_and_captions_need_a_clip(tmp_path: Path) -> None:
    save_vision(tmp_path / "vit", "ViT")
    save_both(tmp_path / "clip")
    vit, clip = str(tmp_path / "vit"), str(tmp_path / "clip")
    losses = LossSettings(distance=vit, discriminator=clip, similarity=SimilaritySettings(model=clip))
    prints = {name: describe(name).fingerprint for name in (vit, clip)}
    used = {"distance": f"{vit} {prints[vit]}", "discriminator": f"{clip} {prints[clip]}"}
    assert networks_used(losses) == used | {"similarity": f"{clip} {prints[clip]}"}
    with pytest.raises(UserError, match="is of type 'vit', expected 'clip'"):
        networks_used(LossSettings(similarity=SimilaritySettings(model=vit)))
    teacher = TeacherFeatures(shallow())
    networks = load_networks(losses, teacher)
    assert isinstance(networks.similarity, ClipSimilarity) and isinstance(networks.distance, FeatureDistance)
    longest = networks.similarity.clip.longest
    cut = networks.similarity.cut(["red", " ".join(["red"] * longest)])
    assert (cut.captions, cut.total, cut.max_tokens, cut.unseen) == (1, 2, longest, "red red")
    looks = images_of(2, 8), cond(2), torch.zeros(2, 2)
    for found, name in ((networks.features, clip), (networks.distance.features, vit)):
        want = VisionFeatures(load_vision(name), teacher)(*looks)
        assert all(torch.equal(a, b) for a, b in zip(found(*looks).tokens, want.tokens, strict=True))


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
    images = made(some.latent, cond(2))
    want = 2 * (images.mean((1, 2, 3)) - some.target.mean((1, 2, 3))).square().mean()
    torch.testing.assert_close(objective.loss(some, GENERATOR).loss, want)


# --- CLIP's similarity ------------------------------------------------------------------------------------------------


def test_similarity_loss_is_one_minus_the_cosine() -> None:
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [5.0, 5.0]])
    assert similarity_loss(a, b).item() == pytest.approx(0.5)
    assert similarity_loss(a, -a).item() == pytest.approx(2)


class Few:
    """Conditions of which the first are the same however many there are."""

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
    alone = alike(made(objective._prior(some.index, GENERATOR), cond(8)[:4]), some.text)
    (want,) = torch.autograd.grad(alone, made.last_layer)
    torch.testing.assert_close(terms.logs["similarity"], alone.detach())
    torch.testing.assert_close(terms.loss, plain.loss + 0.5 * alone)
    torch.testing.assert_close(pulled, grad + 0.5 * want, rtol=1e-3, atol=1e-6)


# --- mistakes and records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "text", "words"),
    [
        (
            {"discriminator": "lpips"},
            {},
            "lpips is a distance; expected teacher, efficientnet-lite0, or a vision model's",
        ),
        ({"similarity": {"model": "x/y"}}, {"classes": 2}, "similarity compares images with captions, and a recipe"),
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


def test_efficientnet_lite0_is_distance_and_discriminator_without_a_hub() -> None:
    named = {"distance": "efficientnet-lite0", "discriminator": "efficientnet-lite0"}
    losses, teacher, made = (
        LossSettings.model_validate(named | {"pixels": 0.0}),
        TeacherFeatures(shallow()),
        generator(),
    )
    fingerprint = describe("efficientnet-lite0").fingerprint
    assert networks_used(losses) == {part: f"{name} {fingerprint}" for part, name in named.items()}
    networks = load_networks(losses, teacher)
    assert isinstance(networks.distance, FeatureDistance) and networks.distance.features is networks.features
    objective = DistillObjective(made, networks.features, Conditions(), losses, 0, networks.distance)
    assert [head.down.in_features for head in objective.discriminator.heads] == [24, 40, 112, 320]
    some = batch(2, 16)
    for part in (GENERATOR, DISCRIMINATOR):
        objective.loss(some, part).loss.backward()
        assert all(p.grad is not None for p in objective.modules[part].parameters() if p.requires_grad)
    far, near = (
        networks.distance(some.target + noise, some.target, cond(2), torch.zeros(2, 2)) for noise in (0.3, 0.03)
    )
    assert (far > near).all() and (near > 0).all()


def test_a_run_records_its_feature_networks_and_refuses_others(tmp_path: Path) -> None:
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
        patch.setattr(looks, "GRID_STEPS", 2)
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
