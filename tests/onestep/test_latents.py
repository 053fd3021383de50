"""The latent of a known image: searches with generators so simple that the answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.sampling import initial_noise
from pixelgrow.errors import UserError
from pixelgrow.onestep.latents import FitSettings, fit, nearest

CPU = torch.device("cpu")


def misfit_to(wanted: Tensor) -> Any:
    return lambda images: (images - wanted).square().mean((1, 2, 3))


def test_the_nearest_of_several_prior_samples_row_by_row() -> None:
    """The first is that of `generate`, of the seed itself; the others have keys of their own."""
    keys = [5, *(rng.seed_of(5, "start", i) for i in range(1, 4))]
    tried = [initial_noise((4, 6), key, range(3)) for key in keys]
    wanted = torch.stack([tried[2][0], tried[0][1], tried[3][2]])
    found = nearest(lambda z: 2 * z, misfit_to(2 * wanted), (3, 4, 6), seed=5, starts=4, device=CPU)
    assert torch.equal(found, wanted)
    alone = nearest(lambda z: 2 * z, misfit_to(2 * wanted), (3, 4, 6), seed=5, starts=1, device=CPU)
    assert torch.equal(alone, tried[0])


def test_a_linear_generator_is_inverted() -> None:
    start = torch.randn(3, 3, 4, 4)
    wanted = start + torch.tensor([0.0, 0.5, 1.0])[:, None, None, None]  # of G(z) = 2 z; the first is there already
    settings = FitSettings(iterations=200, rate=0.1, prior=0.0, tolerance=0.01)
    rows = []

    def generate(z: Tensor) -> Tensor:
        rows.append(z.detach().clone())
        return 2 * z

    calls: list[tuple[int, int]] = []
    found = fit(generate, misfit_to(2 * wanted), start, settings, lambda *at: calls.append(at))
    assert torch.equal(found.latent[0], start[0]) and float(found.error[0]) == 0
    assert (found.error <= 0.01).all()
    torch.testing.assert_close(found.error, misfit_to(2 * wanted)(2 * found.latent).sqrt())
    assert (found.latent - wanted).abs().max() < 0.02
    assert len(rows) < 200 and calls[-1] == (200, 200)  # it ends when all are good enough
    assert calls[:-1] == [(i, 200) for i in range(len(rows) - 1)]


def test_each_row_is_fitted_as_if_it_were_alone() -> None:
    start, wanted = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    settings = FitSettings(iterations=10, prior=0.5, tolerance=0.0)
    both = fit(torch.tanh, misfit_to(wanted), start, settings)
    for i in range(2):
        alone = fit(torch.tanh, misfit_to(wanted[i : i + 1]), start[i : i + 1], settings)
        torch.testing.assert_close(both.latent[i : i + 1], alone.latent)
        torch.testing.assert_close(both.error[i : i + 1], alone.error)


def test_no_iteration_leaves_the_start_and_measures_it() -> None:
    start = torch.ones(1, 3, 2, 2)
    found = fit(lambda z: 3 * z, misfit_to(0 * start), start, FitSettings(iterations=0))
    assert torch.equal(found.latent, start) and float(found.error) == 3


def test_the_prior_keeps_a_latent_as_long_as_noise_is() -> None:
    """Where only the first channel is known, the rest would stay at its start; (|z|^2 / n - 1)^2 moves it."""

    def known(images: Tensor) -> Tensor:
        return images[:, 0].square().mean((1, 2)) + 1e-3  # never within the tolerance

    start = torch.full((1, 3, 4, 4), 0.1)
    lengths = []
    for prior in (0.0, 10.0):
        last: list[Tensor] = []

        def generate(z: Tensor, last: list[Tensor] = last) -> Tensor:
            last.append(z.detach().clone())
            return z

        fit(generate, known, start, FitSettings(iterations=100, rate=0.05, prior=prior, tolerance=0.0))
        lengths.append(float(last[-1].square().mean()))
    assert lengths[0] < 0.01 and lengths[1] == pytest.approx(1, abs=0.05)


def test_the_best_latent_on_the_way_is_kept() -> None:
    """A step so long that it leaps over the minimum: the start was better."""
    start = torch.full((1, 3, 2, 2), 0.1)
    found = fit(lambda z: z, misfit_to(0 * start), start, FitSettings(iterations=1, rate=5.0, prior=0.0))
    assert torch.equal(found.latent, start) and float(found.error) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"iterations": -1}, "iterations=-1"),
        ({"starts": 0}, "starts=0"),
        ({"prior": -0.1}, "prior=-0.1"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": float("inf")}, "rate=inf"),
    ],
)
def test_settings_that_mean_nothing(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FitSettings(**given)


def test_a_generator_that_is_not_finite_is_one_line() -> None:
    start = torch.ones(1, 3, 2, 2)
    with pytest.raises(UserError, match="non-finite pixels"):
        fit(lambda z: z * float("nan"), misfit_to(start), start, FitSettings(iterations=1))
