"""The held-out error against closed forms of denoisers whose error is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.heldout import SIGMAS, denoising_error
from pixelgrow.models.cond import Cond

IMAGES = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
COND = Cond(None, None, None, torch.zeros(5, dtype=torch.bool), torch.arange(5))


def test_a_black_image_is_off_by_the_mean_square_at_every_noise_level() -> None:
    found = denoising_error(lambda x, sigma, cond: 0 * x, IMAGES, COND, scale=1.0, batch=2)
    want = IMAGES.double().square().mean().item()
    assert found == pytest.approx(dict.fromkeys(SIGMAS, want))


def test_the_noisy_image_is_off_by_the_noise_which_is_a_function_of_seed_image_and_level() -> None:
    """`scale` times the core's noise level, standard normal noise by (seed, the image's number, the level)."""
    numbers = [7, 0, 3, 4, 9]
    levels = (0.5, 20.0)
    found = denoising_error(lambda x, *_: x, IMAGES, COND, scale=4.0, seed=2, sigmas=levels, index=numbers)
    for sigma in levels:
        eps = rng.normal((3, 4, 6), 2, f"heldout {sigma}", numbers).double()
        assert found[sigma] == pytest.approx((4 * sigma) ** 2 * eps.square().mean().item(), rel=1e-4)
    assert found[20.0] / found[0.5] != pytest.approx(40**2, rel=1e-4)  # other noise at another level


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_network_receives_each_image_with_its_level_and_condition(batch: int) -> None:
    rows: list[int] = []

    def denoise(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None and len(x) == len(sigma) == len(cond) <= batch
        assert (sigma == 2 * 0.1).all()
        rows.extend(cond.labels.tolist())
        return IMAGES[cond.labels] + cond.labels[:, None, None, None]  # off by its number

    found = denoising_error(denoise, IMAGES, COND, scale=2.0, sigmas=(0.1,), batch=batch)
    assert rows == [0, 1, 2, 3, 4]
    assert found[0.1] == pytest.approx((0 + 1 + 4 + 9 + 16) / 5)
