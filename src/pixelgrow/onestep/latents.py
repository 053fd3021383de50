"""The latent of a partly known image: z* = argmin_z |y - A(G(z, c))|^2 by Adam (PaGoDA, arXiv 2405.14822).

The start of the search, its end and the prior are ours; the paper only names Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.sampling import initial_noise
from pixelgrow.errors import UserError

Generate = Callable[[Tensor], Tensor]
"""Latents (B, 3, h, w) -> images (B, 3, H, W): a generator with its conditions."""
Misfit = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> (B,), the mean squared error of the known part of each."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of the search for a latent. Raises UserError for values out of range.

    iterations: the most steps of Adam. rate: its learning rate.
    starts: prior samples to choose the best start from.
    prior: weight of (|z|^2 / n - 1)^2, which keeps the norm of a latent of n numbers near that of prior samples.
    tolerance: root mean squared error of the known pixels, in the range [-1, 1], at which the search ends.
    """

    iterations: int = 200
    rate: float = 0.05
    starts: int = 8
    prior: float = 0.01
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("starts", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise UserError(f"{name}={value}: expected a whole number, {least} or more")
        for name in ("prior", "tolerance", "rate"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
                raise UserError(f"{name}={value}: expected a number, 0 or more")
        if not self.rate:
            raise UserError(f"rate={self.rate}: expected a number above 0; 0.02 to 0.2 are usual")


@dataclass(frozen=True)
class Fitted:
    """`latent` (B, 3, h, w) and its root mean squared `error` (B,) of the known pixels."""

    latent: Tensor
    error: Tensor


@torch.no_grad()
def nearest(
    generate: Generate, misfit: Misfit, size: tuple[int, int, int], seed: int, starts: int, device: torch.device
) -> Tensor:
    """The best of `starts` prior samples for each of B images: latents (B, 3, h, w); `size` is (B, h, w).

    The first start is the latent of `sampling.generate` for this seed.
    """
    count, *latent = size
    best = torch.full((count,), math.inf, device=device)
    found = torch.zeros(count, 3, *latent, device=device)
    for start in range(starts):
        key = rng.seed_of(seed, "start", start) if start else seed
        z = initial_noise((latent[0], latent[1]), key, range(count)).to(device)
        error = misfit(generate(z))
        found = torch.where((error < best)[:, None, None, None], z, found)
        best = torch.minimum(error, best)
    return found


def fit(
    generate: Generate,
    misfit: Misfit,
    start: Tensor,
    settings: FitSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """The best latents that Adam finds from `start` (B, 3, h, w); each row is searched on its own.

    A row's result is fixed once it is within the tolerance; the search ends when all are. `progress` is called with
    (iterations done, iterations in all). Raises UserError if the generator's images are never finite.
    """
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=settings.rate, betas=(0.9, 0.99))
    best, least = start.clone(), torch.full((len(start),), math.inf, device=start.device)
    for step in range(settings.iterations + 1):
        with torch.enable_grad():
            error = misfit(generate(z))
            power = z.square().mean(dim=(1, 2, 3))
            loss = (error + settings.prior * (power - 1).square()).sum()
        now = error.detach().clamp_min(0).sqrt()
        better = (now < least) & (least > settings.tolerance)
        best = torch.where(better[:, None, None, None], z.detach(), best)
        least = torch.where(better, now, least)
        if step == settings.iterations or bool((least <= settings.tolerance).all()):
            if progress is not None:
                progress(settings.iterations, settings.iterations)
            break
        (z.grad,) = torch.autograd.grad(loss, z)
        optimizer.step()
        if progress is not None:
            progress(step, settings.iterations)
    if not bool(least.isfinite().all()):
        raise UserError("the generator gave non-finite pixels: expected finite ones; try another checkpoint, or fp32")
    return Fitted(best, least)
