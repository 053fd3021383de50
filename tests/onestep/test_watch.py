"""Validation of a generator while it trains, with a generator and features made by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgrow.diffusion.denoiser import RungImage
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import PIXELS
from pixelgrow.models.layers import bounded, box_down, up_nearest
from pixelgrow.onestep.features import FeatureOutput
from pixelgrow.onestep.pairs import psnr
from pixelgrow.onestep.watch import Watch, Watched, energy_distance

N = 5


class Doubling:
    """Images of 8 px from latents of 4 px: the base doubles, the rung above adds 0.125 to the upper half."""

    resolution, latent_resolution, space = 8, 4, PIXELS

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.weights: list[Tensor | None] = []

    def rungs(self, z: Tensor, cond: Cond, guidance: Tensor | None) -> Iterator[RungImage]:
        assert len(z) == len(cond)
        self.rows.append(len(z))
        self.weights.append(guidance)
        low = 2 * z + cond.labels[:, None, None, None]
        nothing: Any = None
        yield RungImage(low, low, nothing)
        high = up_nearest(low, 2).clone()
        high[:, :, :4] += 0.125
        yield RungImage(high, high, nothing)

    def __call__(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        return list(self.rungs(z, cond, guidance))[-1].image


class Means:
    """Two layers of tokens: a wrong one, and the pixels, of which `Watch` takes the mean; then those of a crop."""

    layers = (1, 2)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        assert len(images) == len(cond) <= 2 and torch.equal(crop, torch.full((len(images), 2), 0.5))
        pixels = images.flatten(2).transpose(1, 2)
        return FeatureOutput([-pixels, pixels, 9 * pixels], cond.labels[:, None].float())


def watch(guidance: float | None = None) -> tuple[Watch, Watched]:
    g = torch.Generator().manual_seed(0)
    images, latents, prior, solved = (
        torch.randn(n, 3, side, side, generator=g).mul(0.1) for n, side in ((N, 8), (N, 4), (N, 4), (3, 4))
    )
    cond = Cond(None, None, None, torch.zeros(N, dtype=torch.bool), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    watched = Watched(images, cond, latents, prior, solved, guidance)
    return Watch(Doubling(), Means(), watched, batch=2), watched  # type: ignore[arg-type]


def test_numbers_are_those_of_the_images_in_batches() -> None:
    made, w = watch()
    found = made.numbers()
    rec, prior = (Doubling()(z, w.cond) for z in (w.latents, w.prior))
    pooled = [x.mean((2, 3)) for x in (rec, prior, w.images)]
    assert found == pytest.approx(
        {
            "rec_psnr": psnr(rec, w.images),
            "solved_psnr": psnr(box_down(prior, 2)[:3], w.solved),
            "prior_distance": energy_distance(pooled[1], pooled[2]),
            "rec_distance": energy_distance(pooled[0], pooled[2]),
            "drift_psnr": 10 * torch.log10(torch.tensor(4 / (0.125**2 / 2))).item(),  # half of the pixels are off
        },
        rel=1e-5,
    )
    assert set(made.generator.rows) == {1, 2} and sum(made.generator.rows) == 3 * N  # type: ignore[attr-defined]


def test_a_generator_that_has_not_grown_does_not_drift() -> None:
    made, _ = watch()
    made.generator.resolution = 4  # type: ignore[misc]
    made.watched = Watched(**{**vars(made.watched), "images": made.watched.images[..., :4, :4]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Doubling, "__call__", lambda self, z, cond, guidance=None: 2 * z)
        assert "drift_psnr" not in made.numbers()


@pytest.mark.parametrize(("images", "distances"), [(1, 0), (2, 2)])
def test_distances_need_two_images(images: int, distances: int) -> None:
    _, w = watch()
    few = Watched(w.images[:images], w.cond[slice(images)], w.latents[:images], w.prior[:images], w.solved[:images])
    found = Watch(Doubling(), Means(), few, batch=2).numbers()  # type: ignore[arg-type]
    assert sum("distance" in name for name in found) == distances
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_images_are_generated_in_batches_with_the_weight_of_the_pairs(guidance: float | None) -> None:
    made, w = watch(guidance)
    few = w.cond[:3]
    torch.testing.assert_close(made.generate(w.prior[:3], few), Doubling()(w.prior[:3], few))
    assert made.generator.rows == [2, 1]  # type: ignore[attr-defined]
    for weights in made.generator.weights:  # type: ignore[attr-defined]
        assert weights is None if guidance is None else bool((weights == guidance).all())


def test_images_are_bounded_before_they_are_compared() -> None:
    made, w = watch()
    made.watched = Watched(**{**vars(w), "latents": 50 + w.latents, "images": torch.ones(N, 3, 8, 8)})
    assert made.numbers()["rec_psnr"] == float("inf")


def test_images_of_an_exact_generator_are_bounded_as_samples_are() -> None:
    made, w = watch()
    made.generator.exact_factors = [4]  # type: ignore[misc]
    made.watched = Watched(**{**vars(w), "prior": 5 * w.prior})
    whole = Doubling()(5 * w.prior[:1], w.cond[:1])
    assert (bounded(whole, [4]) - whole.clamp(-1, 1)).abs().max() > 0.01
    assert torch.equal(made.generate(5 * w.prior[:1], w.cond[:1]), bounded(whole, [4]))


def test_energy_distance_is_the_mean_over_rows_of_different_numbers() -> None:
    a, b = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[2.0], [2.0], [9.0]])

    def mean(x: Tensor, y: Tensor) -> float:
        return sum(abs(float(x[i] - y[j])) for i in range(3) for j in range(3) if i != j) / 6

    assert energy_distance(a, b) == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b))
