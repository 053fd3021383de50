"""The objective of distillation on modules made by hand, whose every number is known: which image is rated with which
caption, which weight is whose, and that real and fake images are augmented alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelgrow.models.cond import Cond
from pixelgrow.onestep.distill import DISCRIMINATOR, GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.features import FeatureOutput
from pixelgrow.onestep.settings import LossSettings


class Numbers:
    """Captions are numbers, and so are their conditions."""

    def cond(self, texts: Sequence[str]) -> Cond:
        return Cond(None, None, None, torch.zeros(len(texts), dtype=torch.bool), torch.tensor([int(t) for t in texts]))


class Painter(nn.Module):
    """A generator that paints every pixel in the number of its caption, and a touch of its latent."""

    guided, resolution, latent_resolution = False, 8, 8

    def __init__(self, touch: float = 0.0) -> None:
        super().__init__()
        self.last_layer, self.touch = nn.Parameter(torch.ones(())), touch

    def forward(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        return self.last_layer * cond.labels[:, None, None, None].float() + self.touch * z


class Pixels:
    """Features that are the pixels themselves; the condition is its number."""

    vec_width = 1

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def widths(self, resolution: int) -> list[int]:
        return [3]

    def vec(self, cond: Cond) -> Tensor:
        return cond.labels[:, None].float()

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        self.images.append(images)
        return FeatureOutput([images.flatten(2).transpose(1, 2)], self.vec(cond))


class Agrees(nn.Module):
    """A discriminator of one opinion: minus the squared difference of an image's number and its caption's."""

    def forward(self, features: Sequence[Tensor], vec: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        return [-(features[0].mean(2) - vec).square()]


def objective(losses: LossSettings, touch: float = 0.0, **more: Any) -> DistillObjective:
    made = DistillObjective(Painter(touch), Pixels(), Numbers(), losses, seed=0, **more)  # type: ignore[arg-type]
    if losses.adversarial:
        made.discriminator = made.modules[DISCRIMINATOR] = Agrees()
    return made


def paint(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 8, 8).clone()


def batch(real: Tensor, text: Sequence[int], target: Tensor, target_text: Sequence[int]) -> DistillBatch:
    n = len(text)
    names = [tuple(map(str, t)) for t in (text, target_text)]
    return DistillBatch(real, names[0], torch.arange(n), torch.randn(n, 3, 8, 8), target, names[1])


class Nothing:
    def cond(self, texts: Sequence[str]) -> Cond:
        raise AssertionError("the batch has the conditions of its captions")


@pytest.mark.parametrize("given", [False, True])
def test_every_image_is_rated_with_its_own_caption(given: bool) -> None:
    made = objective(LossSettings(augment=(), balance="fixed"))
    some = batch(paint([1.0, 5.0]), (1, 5), paint([2.0, 7.0]), (2, 7))
    if given:
        made.text = Nothing()
        some = replace(some, cond=Numbers().cond(some.text), target_cond=Numbers().cond(some.target_text))
    terms = made.loss(some, GENERATOR)
    assert float(terms.logs["rec"]) == 0  # pairs are reconstructed under the pairs' captions,
    assert float(terms.logs["adv"]) == 0  # prior samples have the captions of the real images
    logs = made.loss(some, DISCRIMINATOR).logs
    assert [float(logs[name]) for name in ("real", "fake", "mismatched")] == [0, 0, -16]


@pytest.mark.parametrize("adversarial", [True, False])
def test_features_weigh_the_distance_and_pixels_the_squared_error(adversarial: bool) -> None:
    def distance(images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        assert cond.labels.tolist() == [2, 3] and crop.shape == (2, 2)
        return (images - target).abs().amax((1, 2, 3))

    losses = LossSettings(features=5, pixels=7, adversarial=adversarial, balance="fixed")
    some = batch(paint([0.0, 0.0]), (0, 0), paint([3.0, 6.0]), (2, 3))  # off by 1 and by 3
    terms = objective(losses, distance=distance).loss(some, GENERATOR)
    assert float(terms.logs["rec"]) == pytest.approx(5 * (1 + 3) / 2 + 7 * (1 + 9) / 2)


def test_a_fixed_weight_is_the_scale_and_the_sum_is_what_descends() -> None:
    made = objective(LossSettings(augment=(), balance="fixed", scale=0.25, features=0, pixels=2))
    some = batch(paint([1.0, 5.0]), (1, 5), paint([3.0, 7.0]), (2, 7))
    (weight,) = made.modules[GENERATOR].parameters()
    with torch.no_grad():
        weight.fill_(2)  # paints twice the caption
    terms = made.loss(some, GENERATOR)
    rec, adv = 2 * ((4 - 3) ** 2 + (14 - 7) ** 2) / 2, ((2 - 1) ** 2 + (10 - 5) ** 2) / 2
    assert float(terms.logs["rec"]) == pytest.approx(rec)
    assert float(terms.logs["adv"]) == pytest.approx(adv)
    assert float(terms.logs["adv_weight"]) == 0.25
    assert terms.loss.item() == pytest.approx(rec + 0.25 * adv)
    terms.loss.backward()
    slope = 2 * (2 * (4 - 3) * 2 + 2 * (14 - 7) * 7) / 2 + 0.25 * (2 * (2 - 1) * 1 + 2 * (10 - 5) * 5) / 2
    assert float(weight.grad) == pytest.approx(slope)


@pytest.mark.parametrize(("norms", "power"), [("plain", 1), ("squared", 2)])
@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_an_adaptive_weight_is_the_scale_times_the_ratio_of_gradients_in_the_last_layer(
    norms: Any, power: int, scale: float
) -> None:
    made = objective(LossSettings(augment=(), norms=norms, scale=scale, features=0, pixels=2))
    some = batch(paint([1.0, 5.0]), (1, 5), paint([3.0, 7.0]), (2, 5))
    (weight,) = made.modules[GENERATOR].parameters()
    with torch.no_grad():
        weight.fill_(2)  # paints twice the caption
    rec = 2 * ((4 - 3) ** 2 + (10 - 7) ** 2) / 2, 2 * (2 * (4 - 3) * 2 + 2 * (10 - 7) * 5) / 2
    adv = ((2 - 1) ** 2 + (10 - 5) ** 2) / 2, (2 * (2 - 1) * 1 + 2 * (10 - 5) * 5) / 2
    ratio = scale * (rec[1] / adv[1]) ** power
    terms = made.loss(some, GENERATOR)
    assert float(terms.logs["adv_weight"]) == pytest.approx(ratio)
    assert terms.loss.item() == pytest.approx(rec[0] + ratio * adv[0])
    terms.loss.backward()
    assert float(weight.grad) == pytest.approx(rec[1] + ratio * adv[1])


def test_a_real_image_and_the_fake_one_beside_it_are_augmented_alike() -> None:
    """DiffAugment (arXiv 2006.10738) with one draw for a row's real, fake and mismatched image: were the fake equal to
    the real one, the discriminator could not tell them apart."""
    made = objective(LossSettings(augment=("colour", "translation", "cutout")), touch=1.0)
    features = made.features
    some = batch(paint([1.0, 5.0, 3.0]), (1, 5, 3), paint([2.0, 7.0, 4.0]), (2, 7, 4))
    made.loss(some, DISCRIMINATOR)
    rows = torch.arange(3)
    fake = made.generator(made._prior(rows, DISCRIMINATOR), Numbers().cond(some.text))
    made.loss(DistillBatch(fake, some.text, rows, some.latent, some.target, some.target_text), DISCRIMINATOR)
    for seen, equal in zip(features.images, (False, True), strict=True):
        real, generated, mismatched = seen.chunk(3)
        assert torch.equal(mismatched, real) and torch.equal(generated, real) == equal
    assert not torch.equal(real, fake)
    assert (real == 0).flatten(1).any(1).all()  # of translation and cutout
